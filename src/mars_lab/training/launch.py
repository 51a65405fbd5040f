"""From a configuration to a run, from a run folder to a model."""

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from mars_lab.errors import InputError
from mars_lab.models.gpt2 import GPT2
from mars_lab.ranks import Ranks
from mars_lab.tasks.language import LanguageConfig, LanguageTask
from mars_lab.tasks.task import Task
from mars_lab.tasks.vision import VisionTask
from mars_lab.training import run_folder
from mars_lab.training.checkpoint import loader, plain
from mars_lab.training.checkpoint.saver import Saver
from mars_lab.training.config import RunConfig
from mars_lab.training.interruption import Interruption
from mars_lab.training.loop import train
from mars_lab.training.metrics import Metrics
from mars_lab.training.processes import Processes, joined
from mars_lab.training.run import Run
from mars_lab.training.run_folder import RunFolder
from mars_lab.training.watchdog import Watchdog


def start(config: RunConfig, runs: Path, name: str, *, numbered: bool) -> tuple[Task, RunFolder]:
    """Prepare the data and make the folder of a new run, in this order: bad input leaves no folder behind.

    `config` should be free of `auto` (`TrainConfig.resolved`), so that the run can be continued elsewhere.
    """
    task = prepare(config)
    return task, run_folder.create(runs, name, config, numbered=numbered)


def join(config: RunConfig, runs: Path, name: str) -> dict[str, Any]:
    """Train the run `name` together with the processes that a launcher has started; begun already, it is continued.

    Raises:
        InputError: the folder holds something else, or a run with another configuration.
    """
    with joined(config.train) as processes:
        _say_if_restarted(processes.ranks)
        processes.ranks.first_does(lambda: _open_or_start(config, runs, name))
        folder = RunFolder(runs / name)
        return folder.summary() or train(prepare(config), config, folder, processes=processes)


def prepare(config: RunConfig) -> Task:
    """The task of `config`; its data are made ready, and checked."""
    if isinstance(config.task, LanguageConfig):
        return LanguageTask(config.task, config.train.seed)
    return VisionTask(config.task, config.train.seed)


def resume(
    folder: RunFolder,
    *,
    quiet: bool = False,
    layout: Mapping[str, Any] | None = None,
    open_task: Callable[[RunConfig], Task] = prepare,
) -> dict[str, Any]:
    """Continue the run in `folder` and return its summary; a finished run's is returned at once.

    `layout` replaces fields of its `TrainConfig` that say how the work is divided.
    """
    if (summary := folder.summary()) is not None:
        return summary
    config = folder.config()
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **(layout or {})))
    with joined(config.train) as processes:
        _say_if_restarted(processes.ranks)
        processes.ranks.first_does(lambda: prepare(config).fingerprint)
        return train(open_task(config), config, folder, quiet=quiet, processes=processes)


def start_from(model: GPT2, config: RunConfig, runs: Path, name: str, *, numbered: bool) -> RunFolder:
    """Make the folder of a new run whose checkpoint of step 0 has the weights of `model`; `resume` trains it.

    Raises:
        InputError: as `start`, or `model` has another shape than `config`.
    """
    task, folder = start(config, runs, name, numbered=numbered)
    with folder.locked(), ExitStack() as stack:
        saver = stack.enter_context(Saver(folder.checkpoints, Ranks(), num_kept=1))
        here = Ranks(device=config.train.device)
        run = Run(
            task,
            config,
            folder,
            processes=Processes(here),
            saver=saver,
            watchdog=Watchdog(here, config.train.timeout),
            interruption=Interruption(),
        )
        run.model.load_state_dict(model.state_dict())
        run.save(stack.enter_context(Metrics(folder, 0)))
    return folder


def newest_checkpoint(folder: RunFolder) -> Path:
    """The newest undamaged checkpoint of a run.

    Raises:
        InputError: there is none yet, or all are damaged.
    """
    path = loader.newest_good(folder.checkpoints, Ranks())
    if path is None:
        raise InputError(f"{folder.path} has no checkpoint yet; continue it with `mars train --resume {folder.path}`")
    return path


def load_model(folder: RunFolder, checkpoint: Path) -> tuple[LanguageTask, GPT2]:
    """The task of a run and the model of one of its checkpoints, which must be undamaged, on the CPU.

    Raises:
        InputError: the run's model writes no text.
    """
    config = folder.config()
    task = LanguageTask(config.language, config.train.seed)
    return task, cast(GPT2, load_weights(task, checkpoint))


def load_weights(task: Task, checkpoint: Path) -> nn.Module:
    """The model of `task` with the weights of an undamaged checkpoint, on the CPU."""
    state = plain.read(checkpoint)
    with torch.random.fork_rng(devices=[]):
        model = task.build_model()
    model.load_state_dict(state["model"])
    return model


def _open_or_start(config: RunConfig, runs: Path, name: str) -> None:
    folder = RunFolder(runs / name)
    if not (folder.path / "config.json").exists():
        start(config, runs, name, numbered=False)
        return
    begun = folder.config()
    layout = {field: getattr(config.train, field) for field in ("parallel", "group_size")}
    if dataclasses.replace(begun, train=dataclasses.replace(begun.train, **layout)) != config:
        raise InputError(
            f"{folder.path} was begun with another configuration; give it as it stands in its config.json, or choose "
            "another --name"
        )
    prepare(config)


def _say_if_restarted(ranks: Ranks) -> None:
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if ranks.is_first and count != "0":
        print(
            f"Started again, number {count}; continuing from the newest good checkpoint.", file=sys.stderr, flush=True
        )
