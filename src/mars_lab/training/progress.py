"""What a person sees while a run is going: a live line on a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


class RunProgress:
    """Loss, `unit`s per second and time left of a run of `num_steps` steps, beginning at `first_step`.

    `quiet` leaves only the live line, and that only on a terminal. Of several processes one `shows` anything.
    """

    def __init__(
        self, num_steps: int, first_step: int, *, unit: str = "token", quiet: bool, shows: bool = True
    ) -> None:
        self._console = Console(highlight=False)
        self._quiet = quiet or not shows
        self._unit = unit
        self._num_steps = num_steps
        self._first_step = first_step
        self._begin = self._last_line = time.monotonic()
        self._tokens = 0
        self._val_loss = ""
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            console=self._console,
            disable=not (shows and self._console.is_terminal),
            transient=True,
        )
        self._task = self._bar.add_task("", total=num_steps, completed=first_step, status="")

    def step(self, step: int, loss: float, num_tokens: int) -> None:
        """Report that `step` steps are done, the last with `loss` on `num_tokens` training targets."""
        self._tokens += num_tokens
        elapsed = time.monotonic() - self._begin
        left = elapsed / (step - self._first_step) * (self._num_steps - step)
        status = f"loss {loss:.3f}{self._val_loss}  {self._tokens / elapsed:,.0f} {self._unit}s/s  {clock(left)} left"
        self._bar.update(self._task, completed=step, status=status)
        if self._bar.disable and not self._quiet and time.monotonic() - self._last_line > 10:
            self._last_line = time.monotonic()
            self._console.print(f"step {step}/{self._num_steps}  {status}")

    def evaluated(self, step: int, measures: Mapping[str, float]) -> None:
        """Report an evaluation."""
        self._val_loss = f"  val {measures['val_loss']:.3f}"
        if not self._quiet:
            accuracy = f", accuracy {measures['val_accuracy']:.2%}" if "val_accuracy" in measures else ""
            self._console.print(f"step {step}: validation loss {measures['val_loss']:.4f}{accuracy}")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()


def clock(seconds: float) -> str:
    """Seconds as 0:07, 12:30 or 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
