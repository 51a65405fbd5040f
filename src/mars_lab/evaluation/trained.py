"""A trained model of a run: its newest checkpoint, or a certain one."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from mars_lab.data.tokenizer import Tokenizer
from mars_lab.errors import InputError
from mars_lab.evaluation import hf_folder, image_folder
from mars_lab.models.gpt2 import GPT2
from mars_lab.tasks.vision import VisionConfig, VisionTask
from mars_lab.training import launch, run_folder
from mars_lab.training.checkpoint import folder as folders
from mars_lab.training.run_folder import RunFolder


@dataclass(frozen=True)
class Trained:
    """A model, the tokenizer it was trained with, and where it comes from."""

    model: GPT2
    tokenizer: Tokenizer
    run: RunFolder
    checkpoint: Path

    def write(self, path: Path) -> None:
        """Make `path` a folder for `transformers`; see `hf_folder.write`."""
        hf_folder.write(path, self.model, self.tokenizer)


@dataclass(frozen=True)
class Classifier:
    """An image classifier, the images it was trained for, and where it comes from."""

    model: nn.Module
    task: VisionTask
    run: RunFolder
    checkpoint: Path

    def write(self, path: Path) -> None:
        """Make `path` a folder with the weights and what else it takes to use them; see `image_folder.write`."""
        image_folder.write(path, self.model, self.task)


def located(runs: Path, name: str | None) -> tuple[RunFolder, Path]:
    """The run `name` (see `run_folder.find`) with its newest checkpoint, or, if it is the path of one, that checkpoint.

    Raises:
        InputError: there is no such run, or no readable checkpoint.
    """
    if name is not None and _is_checkpoint(Path(name)):
        checkpoint = Path(name).resolve()
        run = RunFolder(checkpoint.parent.parent)
        if (problem := folders.problem(checkpoint)) is not None:
            raise InputError(f"the checkpoint {checkpoint} is damaged ({problem}); give another, or the run {run.path}")
        return run, checkpoint
    run = run_folder.find(runs, name)
    return run, launch.newest_checkpoint(run)


def load(run: RunFolder, checkpoint: Path) -> Trained:
    """The language model of an undamaged checkpoint of `run`.

    Raises:
        InputError: the run trains no language model.
    """
    task, model = launch.load_model(run, checkpoint)
    return Trained(model, task.data.tokenizer, run, checkpoint)


def load_classifier(run: RunFolder, checkpoint: Path, **changes: Any) -> Classifier:
    """The image classifier of an undamaged checkpoint of `run`, its task with `changes` of how it is judged.

    Raises:
        InputError: the run trains no classifier.
    """
    config = run.config()
    if not isinstance(config.task, VisionConfig):
        raise InputError(f"this needs an image classifier, but {run.path} trains a language model")
    task = VisionTask(replace(config.task, **changes), config.train.seed)
    return Classifier(launch.load_weights(task, checkpoint).eval(), task, run, checkpoint)


def _is_checkpoint(path: Path) -> bool:
    return path.name.startswith("step-") and (path.parent.parent / "config.json").is_file() and path.is_dir()
