"""How far several runs have come, read from their folders."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from mars_lab.training.progress import clock
from mars_lab.training.run_folder import RunFolder

_LAST_ROWS = 4096
"""Bytes that have at least one whole row of metrics in them."""


@dataclass(frozen=True)
class Expected:
    """A run that will have taken `num_steps` steps; `cost` is its work in any unit that all have."""

    folder: RunFolder
    num_steps: int
    cost: float = 1.0


class RunsProgress:
    """Runs finished and time left: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, runs: Sequence[Expected]) -> None:
        self._runs = runs
        self._total = sum(run.cost for run in runs)
        self._console = Console(highlight=False)
        self._begin = time.monotonic()
        self._last_line = self._begin - 60
        self._done_before: float | None = None
        columns = (TextColumn("run"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[status]}"))
        is_hidden = not self._console.is_terminal
        self._bar = Progress(*columns, console=self._console, disable=is_hidden, transient=True)
        self._task = self._bar.add_task("", total=len(runs), status="")

    def update(self) -> None:
        """Look, and report."""
        shares = [_share(run) for run in self._runs]
        num_finished = sum(share == 1 for share in shares)
        done = sum(share * run.cost for share, run in zip(shares, self._runs, strict=True))
        if self._done_before is None:
            self._done_before = done
        elapsed, gained = time.monotonic() - self._begin, done - self._done_before
        left = f"about {clock(elapsed / gained * (self._total - done))} left" if gained > 0 else ""
        self._bar.update(self._task, completed=num_finished, status=left)
        if self._bar.disable and time.monotonic() - self._last_line > 30:
            self._last_line = time.monotonic()
            self._console.print(f"{num_finished} of {len(self._runs)} runs finished  {left}".rstrip())

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()


def _share(run: Expected) -> float:
    """Of its steps; 1 when it is finished, however it ended."""
    if (run.folder.path / "summary.json").exists():
        return 1.0
    return min(_last_step(run.folder) / run.num_steps, 0.999)


def _last_step(folder: RunFolder) -> int:
    if not folder.metrics.exists():
        return 0
    with folder.metrics.open("rb") as stream:
        stream.seek(max(0, folder.metrics.stat().st_size - _LAST_ROWS))
        rows = stream.read().split(b"\n")[1:-1]
    return json.loads(rows[-1])["step"] if rows else 0
