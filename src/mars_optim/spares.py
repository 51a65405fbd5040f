"""Where the next previous gradients go while the last ones may still be needed."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from .backends import Backend
from .backends.native_library import WINDOW
from .batch import Batch
from .ownership import is_held_here_alone


class Spares:
    """A buffer for each shape of previous gradient in bf16.

    Kernels that take a step before they know its clip must find g' again where a clip turns out to be needed. So a
    tensor's next g' goes to the buffer that one of the same shape has just done with, and the first one's to a spare:
    nothing is moved that the step would not move anyway. Spares take no more than half of what a batch's previous
    gradients do, the shapes that most tensors have first; what is left over is written over where it is.
    """

    def __init__(self) -> None:
        self._buffers: dict[torch.Size, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """What the spares take."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def rotate_(self, batch: Batch, backend: Backend) -> None:
        """Give the batch's states other buffers for the next previous gradients, where that helps the backend."""
        prev_grads, next_grads = batch.prev_grads, batch.next_grads
        if prev_grads is None or next_grads is None or not (backend.bounds_clip and _is_amendable(batch)):
            return
        shapes = [
            old.shape if _is_plain(old) and state["prev_grad"] is old else None
            for old, state in zip(prev_grads, batch.owners, strict=True)
        ]
        room = sum(old.numel() for old in prev_grads) // 2
        for shape, _ in Counter(shape for shape in shapes if shape is not None).most_common():
            room -= shape.numel()
            if room >= 0 and shape not in self._buffers:
                self._buffers[shape] = torch.empty_like(prev_grads[shapes.index(shape)])
        for i in reversed(range(len(shapes))):  # as the kernels go
            shape = shapes[i]
            spare = None if shape is None else self._buffers.pop(shape, None)
            if shape is None or spare is None:
                continue
            batch.owners[i]["prev_grad"] = next_grads[i] = spare
            if is_held_here_alone(prev_grads, i):
                self._buffers[shape] = prev_grads[i]


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and tensor.is_contiguous() and tensor.numel() >= WINDOW


def _is_amendable(batch: Batch) -> bool:
    """Whether the kernels may update weights, moments and g' before they know the clip."""
    treatment = batch.treatment
    formats = {t.dtype for name in ("exp_avg", "exp_avg_sq") for t in batch.state.get(name, ())[:1]}
    return (
        treatment.preconditioner in ("adamw", "lion")
        and treatment.clip_norm is not None
        and treatment.max_grad_norm is None
        and not treatment.amsgrad
        and batch.spread is None
        and batch.prev_grads is not None
        and batch.prev_grads[0].dtype == torch.bfloat16
        and batch.params[0].dtype == batch.grads[0].dtype == torch.float32
        and formats <= {torch.float32, torch.bfloat16}
    )
