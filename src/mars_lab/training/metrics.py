"""Metrics as JSON lines, the record of a run, and the same in TensorBoard."""

import json
import os
from types import TracebackType
from typing import Self

from torch.utils.tensorboard.writer import SummaryWriter

from mars_lab.report.rows import read_rows
from mars_lab.training.run_folder import RunFolder

MEASURED = ("seconds", "tokens_per_second", "memory_mib")
"""Metrics that the machine decides: no two runs share them."""


class Metrics:
    """Appends one row a line. On opening, rows after `step` are removed: the resumed run writes them again.

    Of several processes one `writes`; on the others nothing happens.
    """

    def __init__(self, folder: RunFolder, step: int, *, writes: bool = True) -> None:
        self._writes = writes
        if not writes:
            return
        kept = [row for row in read_rows(folder.metrics) if step > 0 and row["step"] <= step]
        folder.write(folder.metrics.name, "".join(json.dumps(row) + "\n" for row in kept))
        self._stream = folder.metrics.open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(folder.tensorboard), purge_step=step + 1 if step else None)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record `values` as of `step` steps taken."""
        if not self._writes:
            return
        self._stream.write(json.dumps({"step": step, **values}) + "\n")
        self._stream.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)

    def flush_to_disk(self) -> None:
        """Make the rows survive a power failure; called before a checkpoint that builds on them."""
        if self._writes:
            os.fsync(self._stream.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._writes:
            self._stream.close()
            self._tensorboard.close()
