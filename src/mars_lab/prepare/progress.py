"""What a person sees of a preparation: a bar on a terminal, a line now and then elsewhere."""

import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from mars_lab.prepare.source import Source


class PrepareProgress:
    """Share of the source read, tokens written, speed and time left."""

    def __init__(self, source: Source, manifest: dict[str, Any]) -> None:
        self._source, self._manifest = source, manifest
        self._console = Console(highlight=False)
        self._begin = self._last_line = time.monotonic()
        self._bytes_before = manifest["text_bytes"]
        columns = (TextColumn(source.name), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[status]}"))
        is_hidden = not self._console.is_terminal
        self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console, disable=is_hidden, transient=True)
        self._task = self._bar.add_task("", total=None, status="")

    def update(self, num_tokens: int) -> None:
        """Report that `num_tokens` tokens are written."""
        done, total = self._source.progress()
        elapsed = time.monotonic() - self._begin
        speed = (self._manifest["text_bytes"] - self._bytes_before) / 1e6 / elapsed
        status = f"{num_tokens / 1e6:,.1f} M tokens  {speed:.1f} MB/s of text"
        self._bar.update(self._task, completed=done, total=total, status=status)
        if self._bar.disable and time.monotonic() - self._last_line > 10:
            self._last_line = time.monotonic()
            share = "" if not total else f"{done / total:.0%}  "
            self._console.print(f"{share}{status}")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()
