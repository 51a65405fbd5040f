"""`mars export` and `mars import`: trained models for other tools, and theirs for this one."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mars_lab.errors import InputError
from mars_lab.evaluation import hf_folder, trained
from mars_lab.evaluation.hf_folder import HFFolder
from mars_lab.models.gpt2 import GPT2
from mars_lab.recipes.registry import DEFAULT, find
from mars_lab.tasks.language import LanguageConfig, LanguageTask
from mars_lab.training import launch, run_folder
from mars_lab.training.checkpoint import plain
from mars_lab.training.config import RunConfig


@dataclass(frozen=True)
class ExportCommand:
    """Write a run's newest checkpoint for other tools."""

    path: tyro.conf.Positional[Path]
    """The file (`torch`) or folder to write."""
    run: tyro.conf.Positional[str | None] = None
    """Name or folder of the run, by default the one that was started last; for a folder also a certain checkpoint of
    it."""
    to: Literal["torch", "hf", "safetensors"] = "torch"
    """`torch`: a file of torch.save with everything that resuming needs. `hf`: a folder with a language model and its
    tokenizer, which transformers loads. `safetensors`: a folder with an image classifier and its classes."""
    runs: Path = Path("runs")
    """Folder of the runs."""


@dataclass(frozen=True)
class ImportFileCommand:
    """Make a file of `mars export` the newest checkpoint of a run.

    A folder of Hugging Face in its place becomes a new run; `mars import FOLDER --help` says more.
    """

    path: tyro.conf.Positional[Path]
    """The file."""
    run: tyro.conf.Positional[str | None] = None
    """Name or folder of the run; by default the one that was started last."""
    runs: Path = Path("runs")
    """Folder of the runs."""


@dataclass(frozen=True)
class ImportFolderCommand:
    """Make a GPT-2 of Hugging Face the start of a new run, which `mars train --resume` then trains."""

    path: tyro.conf.Positional[Path]
    """The folder, as `save_pretrained` or `mars export --to hf` write it."""
    run: tyro.conf.Positional[str | None] = None
    """Name of the new run; by default the folder's name and a number."""
    config: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)
    runs: Path = Path("runs")
    """Folder of the runs."""


def export(args: list[str]) -> None:
    """Run `mars export` with `args`."""
    command = tyro.cli(ExportCommand, args=args, prog="mars export")
    if command.to == "hf":
        trained.load(*trained.located(command.runs, command.run)).write(command.path)
        print(f"transformers.GPT2LMHeadModel.from_pretrained({str(command.path)!r}) loads the model")
        return
    if command.to == "safetensors":
        run, checkpoint = trained.located(command.runs, command.run)
        if isinstance(run.config().task, LanguageConfig):
            raise InputError(f"--to safetensors is for image classifiers; {run.path} trains a language model: --to hf")
        trained.load_classifier(run, checkpoint).write(command.path)
        print(f"{command.path} has model.safetensors and, in config.json, its architecture, classes and normalisation")
        return
    step = plain.export(run_folder.find(command.runs, command.run).checkpoints, command.path)
    print(f"{command.path} holds the state after step {step}; torch.load(..., weights_only=True) reads it")


def import_(args: list[str]) -> None:
    """Run `mars import` with `args`, the first of which tells a file from a folder."""
    if args and Path(args[0]).is_dir():
        folder = hf_folder.read(Path(args[0]))
        base = find(DEFAULT).config
        base = replace(base, task=replace(base.language, model=folder.config, sample_tokens=0))
        default = ImportFolderCommand(folder.path, config=base)
        _import_folder(folder, tyro.cli(ImportFolderCommand, args=args, default=default, prog="mars import"))
        return
    command = tyro.cli(ImportFileCommand, args=args, prog="mars import")
    run = run_folder.find(command.runs, command.run)
    with run.locked():
        step = plain.import_(command.path, run.checkpoints)
    print(f"{run.path} continues after step {step} with: mars train --resume {run.path}")


def _import_folder(folder: HFFolder, command: ImportFolderCommand) -> None:
    config = replace(command.config, train=command.config.train.resolved())
    model = GPT2(config.language.model)
    folder.load_into(model)
    data = LanguageTask(config.language, config.train.seed).data
    if data.tokenizer.as_hugging_face().get_vocab() != folder.vocabulary:
        raise InputError(
            f"the vocabulary of {folder.path} isn't that of the data; prepare text with the model's (for GPT-2's: "
            "mars prepare, then --data.tokens FOLDER), or give the --corpus that it was trained on"
        )
    name = command.run or folder.path.resolve().name
    run = launch.start_from(model, config, command.runs, name, numbered=command.run is None)
    print(f"{run.path} begins with the weights of {folder.path}. Next: mars train --resume {run.path}")
