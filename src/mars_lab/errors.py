"""The two failures `mars` reports in one line instead of a traceback."""


class InputError(ValueError):
    """Something the person gave (a flag, a file, a run folder) can't be used; the message names the remedy."""


class TrainingError(RuntimeError):
    """Training can't go on (for example the loss is no longer finite)."""
