"""From a configuration to a run, from a run folder to a model."""

from pathlib import Path
from typing import Any

import torch

from mars_lab.errors import InputError
from mars_lab.models.gpt2 import GPT2
from mars_lab.tasks.language import LanguageTask
from mars_lab.training import checkpoint, run_folder
from mars_lab.training.config import RunConfig
from mars_lab.training.loop import train
from mars_lab.training.run_folder import RunFolder


def start(config: RunConfig, runs: Path, name: str, *, numbered: bool) -> tuple[LanguageTask, RunFolder]:
    """Prepare the data and make the folder of a new run, in this order: bad input leaves no folder behind.

    `config` should be free of `auto` (`TrainConfig.resolved`), so that the run can be continued elsewhere.
    """
    task = LanguageTask(config.task, config.train.seed)
    return task, run_folder.create(runs, name, config, numbered=numbered)


def resume(folder: RunFolder, *, quiet: bool = False) -> dict[str, Any]:
    """Continue the run in `folder` and return its summary; a finished run's is returned at once."""
    if (summary := folder.summary()) is not None:
        return summary
    config = folder.config()
    return train(LanguageTask(config.task, config.train.seed), config, folder, quiet=quiet)


def load_model(folder: RunFolder) -> tuple[LanguageTask, GPT2]:
    """The task of a run and the model of its newest checkpoint, on the CPU.

    Raises:
        InputError: there is no checkpoint yet, or none is readable.
    """
    state = checkpoint.load_newest(folder.checkpoints, "cpu")
    if state is None:
        raise InputError(f"{folder.path} has no checkpoint yet; continue it with `mars train --resume {folder.path}`")
    config = folder.config()
    task = LanguageTask(config.task, config.train.seed)
    with torch.random.fork_rng(devices=[]):
        model = task.build_model()
    model.load_state_dict(state["model"])
    return task, model
