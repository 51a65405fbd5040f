"""Optimizer state that lives in the host's memory and visits the device for the step.

State is brought chunk by chunk: while the device works on one chunk, a second stream carries the results of the one
before back and the next one in. Nobody waits on the host; `synchronize` does, for whoever reads the state there.
On the CPU there is nowhere to carry anything, and the same happens without streams.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from .batch import Batch

# State bytes that visit the device at once: two chunks are there at a time.
CHUNK_BYTES = 1 << 27
_ON_HOST = ("exp_avg", "exp_avg_grad", "exp_avg_sq", "max_exp_avg_sq", "prev_grad", "param_remainder")


def place(state: dict[str, Any], param: Tensor, *, on_host: bool) -> None:
    """Put a parameter's state tensors where they live: on its device, or in (pinned) host memory."""
    home = torch.device("cpu") if on_host else param.device
    for name in (*_ON_HOST, *(f"{name}_scale" for name in _ON_HOST)):
        if name in state and state[name].device != home:
            moved = state[name].to(home)
            state[name] = moved.pin_memory() if on_host and param.device.type == "cuda" else moved


def chunked(batch: Batch, size: int = CHUNK_BYTES) -> list[Batch]:
    """Split the lists of a batch into batches of at most `size` bytes of state, or of one tensor."""
    num_bytes = [sum(tensors[i].nbytes for tensors in batch.state.values()) for i in range(len(batch.params))]
    bounds, filled = [0], 0
    for i, n in enumerate(num_bytes):
        if filled and filled + n > size:
            bounds.append(i)
            filled = 0
        filled += n
    return [_slice(batch, start, stop) for start, stop in zip(bounds, [*bounds[1:], len(num_bytes)], strict=True)]


def _slice(batch: Batch, start: int, stop: int) -> Batch:
    lists = {
        f.name: getattr(batch, f.name)[start:stop] for f in fields(batch) if isinstance(getattr(batch, f.name), list)
    }
    return replace(batch, **lists, state={name: tensors[start:stop] for name, tensors in batch.state.items()})


class Lane:
    """The stream that carries state between the host and one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.module = None if device.type == "cpu" else torch.get_device_module(device)
        self.stream = None if self.module is None else self.module.Stream(device)

    def visits(self, batches: Sequence[Batch]) -> Generator[Batch, None, None]:
        """Yield each batch with its state on the device; carry the state back when the next one is asked for."""
        coming = self._bring(batches[0]) if batches else None
        for i in range(len(batches)):
            assert coming is not None
            batch, pairs, arrival = coming
            if i + 1 < len(batches):
                coming = self._bring(batches[i + 1])
            if self.module is not None:
                self.module.current_stream(self.device).wait_event(arrival)
            yield batch
            self._carry_back(pairs)

    def synchronize(self) -> None:
        """Wait until the state on the host is what the last step left."""
        if self.stream is not None:
            self.stream.synchronize()

    def _on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.module is None else self.module.stream(self.stream)

    def _bring(self, batch: Batch) -> tuple[Batch, list[tuple[Tensor, Tensor]], Any]:
        """Return the batch with its state on the device, the pairs (home, visitor) to carry back, and an event."""
        visitors: dict[int, Tensor] = {}
        user = None if self.module is None else self.module.current_stream(self.device)

        def visit(tensors: Iterable[Tensor]) -> list[Tensor]:
            return [self._copy(t, visitors, user) for t in tensors]

        with self._on_stream():
            written = [*batch.state.values(), *([] if batch.next_grads is None else [batch.next_grads])]
            pairs = [pair for tensors in written for pair in zip(tensors, visit(tensors), strict=True)]
            visiting = replace(
                batch,
                state={name: visit(tensors) for name, tensors in batch.state.items()},
                next_grads=None if batch.next_grads is None else visit(batch.next_grads),
                prev_grads=None if batch.prev_grads is None else visit(batch.prev_grads),
            )
        return visiting, pairs, None if self.stream is None else self.stream.record_event()

    def _copy(self, home: Tensor, visitors: dict[int, Tensor], user: Any) -> Tensor:
        """Return the visitor for a tensor at home; a tensor that stands in two lists has one."""
        if self.module is not None and home.device == self.device:
            return home  # exact mode's gradients
        if home.data_ptr() not in visitors or home.numel() == 0:
            visitor = torch.empty_like(home, device=self.device).copy_(home, non_blocking=True)
            if user is not None:
                visitor.record_stream(user)
            visitors[home.data_ptr()] = visitor
        return visitors[home.data_ptr()]

    def _carry_back(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        if self.stream is not None and self.module is not None:
            self.stream.wait_stream(self.module.current_stream(self.device))
        with self._on_stream():
            for home, visitor in pairs:
                home.copy_(visitor, non_blocking=True)
