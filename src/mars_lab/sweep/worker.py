"""A process that does the runs of a sweep, one after the other: `python -m mars_lab.sweep.worker FOLDER`."""

import json
import math
import threading
import time
import warnings
from pathlib import Path
from typing import Any

from optuna.trial import Trial

from mars_lab.report.rows import read_rows
from mars_lab.sweep import plan as plans
from mars_lab.sweep.attempt import attempt, write_summary
from mars_lab.sweep.queue import Job, Queue
from mars_lab.sweep.studies import DIVERGED, Studies
from mars_lab.sweep.workers import serve
from mars_lab.training import launch, run_folder
from mars_lab.training.config import RunConfig

COSTS = "costs.jsonl"
"""A row an attempt at a run, with its processor seconds; an attempt that was killed has none."""


class _Pruned(Exception):  # noqa: N818 - no error
    """A trial has fallen behind."""


class _Observed:
    """A task whose evaluations are told to a trial, which may end it."""

    def __init__(self, task: Any, trial: Trial, metrics: Path) -> None:
        self._task, self._trial, self._metrics = task, trial, metrics

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def evaluate(self, *args: Any) -> dict[str, float]:
        measures = self._task.evaluate(*args)
        step = max((row["step"] for row in read_rows(self._metrics)), default=0)
        if step:
            with warnings.catch_warnings():  # a continued trial evaluates some steps again, to the same value
                warnings.filterwarnings("ignore", message="The reported value is ignored")
                self._trial.report(measures["val_loss"], step)
            if self._trial.should_prune():
                raise _Pruned
        return measures


def work(folder: Path, stop: threading.Event | None = None) -> None:
    """Do runs of the sweep in `folder` until all are finished, or until `stop` is set and the run under way has ended.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the state of the run has been saved.
    """
    stop = stop or threading.Event()
    plan = plans.read(folder)
    studies = Studies(plan)
    queue = Queue(plan, studies)
    while not stop.is_set():
        if (job := queue.next()) is not None:
            try:
                _do(job, studies)
            finally:
                job.claim.release()
        elif queue.is_empty():
            return
        else:
            time.sleep(0.5)  # for the trials of others


def _do(job: Job, studies: Studies) -> None:
    begin = time.process_time()
    try:
        summary = _summary(job)
    finally:
        with (job.folder.path / COSTS).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"processor_seconds": time.process_time() - begin}) + "\n")
    if job.trial is not None:
        loss = summary["val_loss"]
        value = None if summary.get("pruned") else DIVERGED if loss is None or not math.isfinite(loss) else loss
        studies.tell(job.optimizer, job.trial.number, value)


def _summary(job: Job) -> dict[str, Any]:
    folder = job.folder
    if not (folder.path / "config.json").exists():
        run_folder.create(folder.path.parent, folder.path.name, job.config, numbered=False)
    trial = job.trial

    def open_task(config: RunConfig) -> Any:
        task = launch.prepare(config)
        return task if trial is None else _Observed(task, trial, folder.metrics)

    try:
        return attempt(folder, open_task)
    except _Pruned:
        last = read_rows(folder.metrics)[-1]
        return write_summary(folder, {"val_loss": last.get("val_loss"), "steps": last["step"], "pruned": True})


if __name__ == "__main__":
    serve(work)
