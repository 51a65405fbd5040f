"""Ctrl-C and SIGTERM as a request to stop after the current step."""

import signal
from types import FrameType, TracebackType
from typing import Self


class Interrupted(Exception):  # noqa: N818 - it reports a wish, not an error
    """Training stopped on request; `exit_code` is 128 plus the signal, as shells have it."""

    def __init__(self, what: str, signal_number: int) -> None:
        super().__init__(what)
        self.exit_code = 128 + signal_number


class Interruption:
    """While entered, the first Ctrl-C or SIGTERM is noted in `signal_number`; a second one acts as usual."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous: dict[int, object] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()
