"""A process that does the runs of a plan, one after the other: `python -m mars_lab.reproduce.worker FOLDER`.

Runs belong to several plans; which process works on one is decided by a file lock in the run's folder.
"""

import json
import threading
import time
from pathlib import Path

from mars_lab.sweep.attempt import attempt
from mars_lab.sweep.claim import claim
from mars_lab.sweep.workers import serve
from mars_lab.training import elastic
from mars_lab.training.run_folder import RunFolder

QUEUE = "queue.json"
_MAX_RESTARTS = 3


def work(folder: Path, stop: threading.Event | None = None) -> None:
    """Do the runs that the queue in `folder` names until all are finished, or until `stop` is set.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the state of the run has been saved.
        TrainingError: a run can't go on, and it isn't that it diverged.
    """
    stop = stop or threading.Event()
    queue = json.loads((folder / QUEUE).read_text(encoding="utf-8"))
    runs = [RunFolder(Path(path)) for path in queue["runs"]]
    while not stop.is_set():
        left = [run for run in runs if run.summary() is None]
        if not left:
            return
        if not any(_do(run, queue["num_processes"]) for run in left):
            time.sleep(0.5)  # for the runs of others


def _do(run: RunFolder, num_processes: int) -> bool:
    """Finish a run, unless another process has it."""
    right = claim(run.path)
    if right is None:
        return False
    try:
        if num_processes == 1:
            attempt(run)
        else:
            elastic.launch(("-m", "mars_lab.reproduce.rank", str(run.path)), num_processes, max_restarts=_MAX_RESTARTS)
    finally:
        right.release()
    return True


if __name__ == "__main__":
    serve(work)
