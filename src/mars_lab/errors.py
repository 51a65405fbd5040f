"""The failures `mars` reports in one line instead of a traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Something the person gave (a flag, a file, a run folder) can't be used; the message names the remedy."""


class TrainingError(RuntimeError):
    """Training can't go on (for example the loss is no longer finite)."""


class DivergenceError(TrainingError):
    """The loss or a weight is not finite any more; in a comparison that is a result."""


@contextmanager
def reported(speaker: str) -> Iterator[None]:
    """End the process with one line on stderr and an exit code when the block raises one of the expected errors."""
    try:
        yield
    except (InputError, TrainingError) as error:
        print(f"{speaker}: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except OSError as error:
        print(f"{speaker}: {error.strerror or error}: {error.filename or 'while reading or writing'}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{speaker}: stopped", file=sys.stderr)
        sys.exit(130)
