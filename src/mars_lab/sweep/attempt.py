"""A run of a comparison: made where it isn't there, continued where it is; one that diverges has come to a result."""

import json
from collections.abc import Callable
from typing import Any

from mars_lab.errors import DivergenceError
from mars_lab.tasks.task import Task
from mars_lab.training import launch
from mars_lab.training.config import RunConfig
from mars_lab.training.processes import speaks
from mars_lab.training.run_folder import RunFolder


def attempt(folder: RunFolder, open_task: Callable[[RunConfig], Task] = launch.prepare) -> dict[str, Any]:
    """Continue the run in `folder` to its end and return its summary, with `diverged` where that was its end.

    Several processes that a launcher has started call it together.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the state has been saved.
        TrainingError: anything but a divergence, such as a full disk; the same call again goes on.
    """
    try:
        return launch.resume(folder, quiet=True, open_task=open_task)
    except DivergenceError as error:
        summary = {"val_loss": None, "diverged": str(error)}
        return write_summary(folder, summary) if speaks() else summary


def write_summary(folder: RunFolder, summary: dict[str, Any]) -> dict[str, Any]:
    """Mark the run as finished, with `summary`."""
    folder.write("summary.json", json.dumps(summary, indent=2) + "\n")
    return summary
