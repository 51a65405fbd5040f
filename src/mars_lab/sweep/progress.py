"""How far a sweep has come, read from its folder."""

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from mars_lab.report.run_record import TUNING_FOLDER
from mars_lab.sweep.plan import FINAL_FOLDER, Plan
from mars_lab.training.progress import clock

_LAST_ROWS = 4096
"""Bytes that have at least one whole row of metrics in them."""


class SweepProgress:
    """Runs finished and time left: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._console = Console(highlight=False)
        self._begin = time.monotonic()
        self._last_line = self._begin - 60
        self._finished: set[Path] = set()
        self._share_before: float | None = None
        columns = (TextColumn("run"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[status]}"))
        is_hidden = not self._console.is_terminal
        self._bar = Progress(*columns, console=self._console, disable=is_hidden, transient=True)
        self._task = self._bar.add_task("", total=plan.num_runs, status="")

    def update(self) -> None:
        """Look, and report."""
        share = self._done()
        if self._share_before is None:
            self._share_before = share
        elapsed, gained = time.monotonic() - self._begin, share - self._share_before
        left = f"about {clock(elapsed / gained * (self._plan.num_runs - share))} left" if gained > 0 else ""
        self._bar.update(self._task, completed=len(self._finished), status=left)
        if self._bar.disable and time.monotonic() - self._last_line > 30:
            self._last_line = time.monotonic()
            self._console.print(f"{len(self._finished)} of {self._plan.num_runs} runs finished  {left}".rstrip())

    def _done(self) -> float:
        """In runs, those under way by their steps."""
        share = 0.0
        for part in (TUNING_FOLDER, FINAL_FOLDER):
            for metrics in (self._plan.folder / part).glob("*/metrics.jsonl"):
                if (metrics.parent / "summary.json").exists():
                    self._finished.add(metrics.parent)
                else:
                    share += _last_step(metrics) / self._plan.config.base.train.num_steps
        return len(self._finished) + share

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()


def _last_step(metrics: Path) -> int:
    with metrics.open("rb") as stream:
        stream.seek(max(0, metrics.stat().st_size - _LAST_ROWS))
        rows = stream.read().split(b"\n")[1:-1]
    return json.loads(rows[-1])["step"] if rows else 0
