"""Who works on a run: a file lock, which goes when its process does, however that ends."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


class Claim:
    """The right to a run folder, until `release`."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def release(self) -> None:
        """Let others have it."""
        self._stream.close()


def claim(folder: Path) -> Claim | None:
    """The right to `folder`, which is made where it isn't there; None if a living process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    stream = (folder / ".claim").open("w")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        return None
    return Claim(stream)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process at a time, of all that work on the sweep in `folder`; the others wait."""
    with (folder / ".queue").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
