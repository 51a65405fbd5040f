"""Tuning several optimizers with equal budgets, and running each at its best with several seeds.

The runs are done by worker processes that take them from a queue in the sweep's folder; more workers, on this machine
or on others that see the folder, can join at any time, and any of them can be killed.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from mars_lab.errors import InputError, TrainingError
from mars_lab.report import command as report
from mars_lab.report import discovery
from mars_lab.report.findings import Findings, findings
from mars_lab.report.run_record import TUNING_FOLDER
from mars_lab.sweep import budget
from mars_lab.sweep import plan as plans
from mars_lab.sweep.plan import FINAL_FOLDER, Plan
from mars_lab.sweep.progress import SweepProgress
from mars_lab.sweep.studies import Studies
from mars_lab.training import launch
from mars_lab.training.interruption import Interrupted, Interruption

_PATIENCE = 60
"""Seconds that workers have to save their runs."""


def sweep(plan: Plan, num_workers: int) -> Findings:
    """Do what is left of `plan` with `num_workers` processes, and write the report.

    Raises:
        InputError: the data or the storage cannot be used, or the folder holds another sweep.
        Interrupted: Ctrl-C or SIGTERM; the runs under way have been saved.
        TrainingError: a worker failed.
    """
    first = next(iter(plan.optimizers))
    launch.prepare(plan.run_config(first, {}))  # mistakes are better said once than by every worker
    plans.begin(plan)
    studies = Studies(plan)
    for name in plan.optimizers:
        studies.trials(name)  # makes the study, before workers do so at once
    with Interruption() as interruption, SweepProgress(plan) as progress, _workers(plan.folder, num_workers) as workers:
        while any(worker.poll() is None for worker in workers):
            if (number := interruption.signal_number) is not None:
                raise Interrupted("stopped, and saved the runs under way", number)
            _require_success(plan.folder, workers)
            progress.update()
            time.sleep(0.2)
        _require_success(plan.folder, workers)
    return _report(plan, studies)


def _report(plan: Plan, studies: Studies) -> Findings:
    places = [plan.folder / part for part in (TUNING_FOLDER, FINAL_FOLDER) if (plan.folder / part).is_dir()]
    found = findings(discovery.read_all(discovery.find(places), Console()))
    extra = (budget.HEADING, budget.table(plan, studies), budget.NOTE)
    report.write(found, plan.folder, f"Sweep {plan.folder.resolve().name}", [extra])
    return found


@contextmanager
def _workers(folder: Path, count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Worker processes; those that still run at the end are asked to save and stop."""
    if count < 1:
        raise InputError(f"--workers must be at least 1, got {count}")
    # More threads than cores make each other wait.
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    workers: list[subprocess.Popen[bytes]] = []
    try:
        for index in range(count):
            with (folder / f"worker-{index}.log").open("wb") as log:
                workers.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "mars_lab.sweep.worker", str(folder)],
                        stdin=subprocess.PIPE,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env={**os.environ, "OMP_NUM_THREADS": threads},
                        process_group=0,  # Ctrl-C is for this process, which has the workers save
                    )
                )
        yield workers
    finally:
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.close()
        for worker in workers:
            try:
                worker.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()


def _require_success(folder: Path, workers: list[subprocess.Popen[bytes]]) -> None:
    for index, worker in enumerate(workers):
        if code := worker.poll():
            log = folder / f"worker-{index}.log"
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines() or ["it wrote nothing"]
            message = lines[-1].removeprefix("mars sweep: ")
            if code == 2:
                raise InputError(message)
            raise TrainingError(f"worker {index} ended with exit code {code} ({message}); all it wrote is in {log}")
