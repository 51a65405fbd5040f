"""The next batch, read while the step runs."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

_NUM_PENDING = 2
"""The batch after this one, and, in exact mode, which goes through a step's batches twice, that after the step."""


class Prefetch:
    """Batches of `load`, the one that follows read ahead in a thread, pinned where the device is a GPU.

    What is returned depends on what is asked for alone: a batch nobody foresaw is read on the spot. An error in the
    thread is raised when its batch is asked for.
    """

    def __init__(self, load: Callable[[int, int], Tensor], device: str) -> None:
        self._load = load
        self._device = torch.device(device)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")  # ends with this object
        self._pending: dict[tuple[int, int], Future[Tensor]] = {}

    def take(self, first: int, count: int, *, following: int) -> Tensor:
        """Sequences `first` to `first + count - 1` on the device; `count` from `following` are expected next."""
        ahead = self._pending.pop((first, count), None)
        if (following, count) not in self._pending:
            while len(self._pending) >= _NUM_PENDING:
                self._pending.pop(next(iter(self._pending))).cancel()
            self._pending[following, count] = self._thread.submit(self._read, following, count)
        batch = self._read(first, count) if ahead is None else ahead.result()
        return batch.to(self._device, non_blocking=True)

    def _read(self, first: int, count: int) -> Tensor:
        batch = self._load(first, count)
        return batch.pin_memory() if self._device.type == "cuda" else batch
