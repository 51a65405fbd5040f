"""Doing the runs of a plan: by workers, each of which may be killed; finished ones are not repeated."""

import json
import os
from pathlib import Path

import torch

from mars_lab.errors import InputError
from mars_lab.reproduce.plan import Plan, is_same
from mars_lab.reproduce.worker import QUEUE
from mars_lab.sweep import workers
from mars_lab.sweep.claim import alone
from mars_lab.sweep.progress import RunsProgress
from mars_lab.sweep.sweep import sweep
from mars_lab.training import launch, run_folder
from mars_lab.training.config import RunConfig
from mars_lab.training.processes import mesh_shape
from mars_lab.training.run_folder import RunFolder


def train(plan: Plan, num_workers: int, num_processes: int) -> None:
    """Do what is left of `plan` with `num_workers` runs at a time, each on `num_processes` processes.

    Raises:
        InputError: the data can't be used, or a run was begun with other settings.
        Interrupted: Ctrl-C or SIGTERM; the runs under way have been saved.
        TrainingError: a worker failed.
    """
    if num_workers < 1 or num_processes < 1:
        raise InputError(f"--workers and --nproc must be at least 1, got {num_workers} and {num_processes}")
    _require_data(plan)
    if plan.num_lrs is not None:
        _tune(plan, num_workers, num_processes)
        return
    for config in plan.configs.values():
        mesh_shape(config.train, num_processes, num_processes)
    plan.folder.mkdir(parents=True, exist_ok=True)
    with alone(plan.root):
        for path, config in plan.runs.items():
            _begin(path, config)
        queue = {"runs": [str(path.resolve()) for path in plan.runs], "num_processes": num_processes}
        RunFolder(plan.folder).write(QUEUE, json.dumps(queue, indent=1) + "\n")
    count = min(num_workers, sum(RunFolder(path).summary() is None for path in plan.runs))
    if count == 0:
        return
    devices = (os.environ.get("CUDA_VISIBLE_DEVICES") or "").split(",")
    if devices == [""]:
        devices = list(map(str, range(torch.cuda.device_count())))
    with RunsProgress(plan.expected) as progress:
        shares = device_shares(devices, count, num_processes)
        workers.run("mars_lab.reproduce.worker", plan.folder, count, progress.update, shares)


def device_shares(devices: list[str], num_workers: int, num_processes: int) -> list[dict[str, str]]:
    """The variables that give each worker GPUs of its own; where there are too few they are shared in turn."""
    if num_workers == 1 or len(devices) < 2:
        return []
    return [
        {
            "CUDA_VISIBLE_DEVICES": ",".join(
                dict.fromkeys(devices[(worker * num_processes + i) % len(devices)] for i in range(num_processes))
            )
        }
        for worker in range(num_workers)
    ]


def _require_data(plan: Plan) -> None:
    """A mistake is better said once, and before anything is written, than by every worker."""
    first = next(iter(plan.configs.values()))
    try:
        launch.prepare(first)
    except InputError as error:
        raise InputError(f"{error}; give what {plan.exhibit.name} is trained on with --corpus PATH") from None


def _tune(plan: Plan, num_workers: int, num_processes: int) -> None:
    if num_processes > 1:
        raise InputError(f"--num-lrs tunes with runs of one process each; leave out --nproc {num_processes}")
    for number, recipe in enumerate(plan.recipes, 1):
        print(f"tuning {number} of {len(plan.recipes)}: {recipe}", flush=True)
        sweep(plan.sweep(recipe), num_workers)


def _begin(path: Path, config: RunConfig) -> None:
    """Make the folder of a run, or find that it is the one there."""
    if not (path / "config.json").exists():
        run_folder.create(path.parent, path.name, config, numbered=False)
    elif not is_same(RunFolder(path).config(), config):
        raise InputError(
            f"{path} was begun with other settings (another --corpus, perhaps); give those, or another --runs"
        )
