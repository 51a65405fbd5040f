"""Where the next previous gradients go while the last ones may still be needed."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .backends import Backend
from .backends.native_library import WINDOW
from .batch import Batch
from .ownership import is_held_by_its_state_alone


class Spares:
    """Buffers for previous gradients in bf16.

    Kernels that take a step before they know its clip must find g' again where a clip turns out to be needed. So a
    tensor's next g' goes to the buffer that one of the same shape has done with, and the first ones' to spares: nothing
    is moved that the step would not move anyway. Spares take no more than half of what the previous gradients of a
    batch do, the shapes that most tensors have first; what is left over is written over where it is.
    """

    def __init__(self) -> None:
        self._buffers: dict[torch.Size, deque[Tensor]] = {}
        self._used: set[torch.Size] = set()

    @property
    def nbytes(self) -> int:
        """What the spares take."""
        return sum(buffer.nbytes for buffers in self._buffers.values() for buffer in buffers)

    def sweep(self) -> None:
        """Give back what no batch has used since the last call."""
        self._buffers = {shape: buffers for shape, buffers in self._buffers.items() if shape in self._used}
        self._used.clear()

    @contextmanager
    def lent(self, batch: Batch, backend: Backend) -> Generator[None, None, None]:
        """Inside the block the batch's next previous gradients have other places, where that helps the backend.

        The backend makes them the states' when it has written them.
        """
        try:
            if backend.bounds_clip and _is_amendable(batch):
                self._move(batch)
            yield
        except BaseException:
            self._buffers.clear()  # a state may have kept one of them
            raise

    def _move(self, batch: Batch) -> None:
        prev_grads, next_grads = batch.prev_grads, batch.next_grads
        assert prev_grads is not None
        assert next_grads is not None
        shapes = [
            old.shape if _is_plain(old) and state["prev_grad"] is old else None
            for old, state in zip(prev_grads, batch.owners, strict=True)
        ]
        self._provide(shapes, sum(old.numel() for old in prev_grads) // 2, prev_grads)
        for i in reversed(range(len(shapes))):  # as the kernels go
            shape = shapes[i]
            buffers = None if shape is None else self._buffers.get(shape)
            if buffers:
                next_grads[i] = buffers.popleft()
                batch.moves_prev_grads = True
                is_free = is_held_by_its_state_alone(prev_grads, i)
                buffers.append(prev_grads[i] if is_free else torch.empty_like(prev_grads[i]))

    def _provide(self, shapes: Sequence[torch.Size | None], room: int, like: Sequence[Tensor]) -> None:
        """See to it that there are spares for these shapes, of no more than `room` elements.

        Several where few tasks of WINDOW elements make up a tensor, so that threads need not wait for each other.
        """
        num_tasks = 2 * (torch.get_num_threads() - 1)
        for shape, count in Counter(shape for shape in shapes if shape is not None).most_common():
            tasks_each = -(-shape.numel() // WINDOW)
            wanted = min(count, max(1, -(-num_tasks // tasks_each)), room // shape.numel())
            room -= wanted * shape.numel()
            self._used.add(shape)
            buffers = self._buffers.setdefault(shape, deque())
            while len(buffers) < wanted:
                buffers.append(torch.empty_like(like[shapes.index(shape)]))
            while len(buffers) > wanted:
                buffers.pop()


def _is_plain(tensor: Tensor) -> bool:
    if type(tensor) is not Tensor or not tensor.is_contiguous() or tensor.numel() < WINDOW:
        return False
    return not tensor.untyped_storage().is_shared()  # `tensor.is_shared()` takes ten times as long


def _is_amendable(batch: Batch) -> bool:
    """Whether the kernels may update weights, moments and g' before they know the clip."""
    treatment, prev_grads = batch.treatment, batch.prev_grads
    moments = {t.dtype for name in ("exp_avg", "exp_avg_sq") for t in batch.state.get(name, ())[:1]}
    return (
        treatment.preconditioner in ("adamw", "lion")
        and treatment.clip_norm is not None
        and treatment.max_grad_norm is None
        and not treatment.amsgrad
        and batch.spread is None
        and prev_grads is not None
        and batch.next_grads is not None
        and prev_grads[0].dtype == torch.bfloat16
        and batch.params[0].dtype == batch.grads[0].dtype == torch.float32
        and (moments == {torch.float32} or moments == {torch.bfloat16})
    )
