"""Metrics as JSON lines, the record of a run, and the same in TensorBoard and, if wanted, Weights & Biases."""

import json
import os
import uuid
from types import TracebackType
from typing import Any, Self

from torch.utils.tensorboard.writer import SummaryWriter

from mars_lab.report.rows import read_rows
from mars_lab.training.run_folder import RunFolder

MEASURED = ("seconds", "tokens_per_second", "memory_mib")
"""Metrics that the machine decides: no two runs share them."""


class Metrics:
    """Appends one row a line. On opening, rows after `step` are removed: the resumed run writes them again.

    Of several processes one `writes`; on the others nothing happens.
    """

    def __init__(self, folder: RunFolder, step: int, *, writes: bool = True, wandb: bool = False) -> None:
        self._writes = writes
        if not writes:
            return
        kept = [row for row in read_rows(folder.metrics) if step > 0 and row["step"] <= step]
        folder.write(folder.metrics.name, "".join(json.dumps(row) + "\n" for row in kept))
        self._stream = folder.metrics.open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(folder.tensorboard), purge_step=step + 1 if step else None)
        self._wandb = _open_wandb(folder) if wandb else None

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record `values` as of `step` steps taken."""
        if not self._writes:
            return
        self._stream.write(json.dumps({"step": step, **values}) + "\n")
        self._stream.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

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
            if self._wandb is not None:
                self._wandb.finish(exit_code=0 if error is None else 1)


def _open_wandb(folder: RunFolder) -> Any:
    """The run's page, found again when the run is continued, though the folder be moved."""
    import wandb  # pyright: ignore[reportMissingImports]  # optional, and slow to load

    mark = folder.path / "wandb-id"
    if not mark.exists():
        folder.write(mark.name, uuid.uuid4().hex)
    config = json.loads((folder.path / "config.json").read_text())
    return wandb.init(
        project="mars", name=folder.path.name, id=mark.read_text(), resume="allow", dir=folder.path, config=config
    )
