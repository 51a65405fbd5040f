"""`mars train`, and `torchrun ... -m mars_lab.train`: the same command in one process and in each of many."""

import dataclasses
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mars_lab.errors import InputError, reported
from mars_lab.recipes import registry
from mars_lab.recipes.registry import DEFAULT
from mars_lab.tasks.language import LanguageConfig
from mars_lab.training import elastic, launch, loop, run_folder
from mars_lab.training.allocator import keep_freed_memory
from mars_lab.training.config import RunConfig
from mars_lab.training.interruption import Interrupted
from mars_lab.training.processes import mesh_shape, speaks, were_launched
from mars_lab.training.run_folder import RunFolder


@dataclass(frozen=True)
class _Launch:
    runs: Path = Path("runs")
    """Folder of the runs."""
    nproc: int | None = None
    """Train with so many processes on this machine, started again when one of them fails."""
    max_restarts: int = 3
    """How often; then the training ends with an error."""

    def __post_init__(self) -> None:
        if self.nproc is not None and self.nproc < 1:
            raise InputError(f"--nproc must be at least 1, got {self.nproc}")
        if self.nproc is not None and were_launched():
            raise InputError("--nproc starts processes, but a launcher has started this one; leave it out")


@dataclass(frozen=True)
class TrainCommand(_Launch):
    """Train a model. `mars train --resume [RUN]` continues a run that was stopped."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=RunConfig)
    name: str | None = None
    """Name of the run's folder; by default the recipe's name and a number. Under torchrun it is needed, and the same
    command again continues the run."""


@dataclass(frozen=True)
class ResumeCommand(_Launch):
    """Continue a run with the configuration it was started with, on any number of processes."""

    run: tyro.conf.Positional[str | None] = None
    """Name or folder of the run; by default the one that was started last."""
    parallel: Literal["ddp", "fsdp", "hsdp", "tp"] | None = None
    """As --train.parallel; None means as before."""
    group_size: int | None = None
    """As --train.group-size; None means as before."""


def main(args: list[str]) -> None:
    """Run `mars train` with `args`."""
    if "--resume" in args:
        args.remove("--resume")
        _resume(tyro.cli(ResumeCommand, args=args, prog="mars train --resume"))
        return
    name = args.pop(0) if args and not args[0].startswith("-") else DEFAULT
    command = tyro.cli(
        TrainCommand, args=args, default=TrainCommand(config=registry.find(name).config), prog=f"mars train {name}"
    )
    config = dataclasses.replace(command.config, train=command.config.train.resolved())
    if were_launched():
        if command.name is None:
            raise InputError("processes that a launcher starts need --name, so that all of them find the same folder")
        folder = RunFolder(command.runs / command.name)
        _guard(folder, lambda: launch.join(config, command.runs, folder.path.name))
        return
    if command.nproc is not None:
        mesh_shape(config.train, command.nproc, command.nproc)
    task, folder = launch.start(
        config, command.runs, command.name or name.replace("/", "-"), numbered=command.name is None
    )
    print(f"Training {folder.path} with {config.optimizer.name} in {config.train.precision}", flush=True)
    if command.nproc is None:
        _guard(folder, lambda: loop.train(task, config, folder))
    else:
        _launch(folder, command, [])


def _resume(command: ResumeCommand) -> None:
    folder = run_folder.find(command.runs, command.run)
    if folder.summary() is not None:
        print(f"{folder.path} is finished; there is nothing to resume.")
        return
    layout = {name: getattr(command, name) for name in ("parallel", "group_size") if getattr(command, name) is not None}
    if command.nproc is None:
        if not were_launched():
            print(f"Continuing {folder.path}", flush=True)
        _guard(folder, lambda: launch.resume(folder, layout=layout))
        return
    config = folder.config()
    mesh_shape(dataclasses.replace(config.train, **layout), command.nproc, command.nproc)
    launch.prepare(config)  # mistakes and damaged data are better said once than by every process
    print(f"Continuing {folder.path}", flush=True)
    flags = [text for name, value in layout.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    _launch(folder, command, flags)


def _launch(folder: RunFolder, command: _Launch, flags: list[str]) -> None:
    assert command.nproc is not None
    arguments = ("-m", "mars_lab.train", "--resume", str(folder.path), *flags)
    try:
        elastic.launch(arguments, command.nproc, max_restarts=command.max_restarts)
    except Interrupted as interrupted:
        _say_how_to_continue(folder, interrupted)


def _guard(folder: RunFolder, work: Callable[[], dict[str, Any]]) -> None:
    try:
        summary = work()
    except Interrupted as interrupted:
        if not speaks():
            sys.exit(interrupted.exit_code)
        _say_how_to_continue(folder, interrupted)
    if speaks():
        writes_text = isinstance(folder.config().task, LanguageConfig)
        following = f"sample {folder.path} --prompt 'We the people'" if writes_text else f"evaluate {folder.path}"
        accuracy = f", accuracy {summary['val_accuracy']:.2%}," if "val_accuracy" in summary else ""
        print(
            f"Validation loss {summary['val_loss']:.4f}{accuracy} after {summary['steps']} steps, "
            f"{summary['tokens']:,} {'tokens' if writes_text else 'images'}, {summary['seconds']:.0f} s in steps.\n"
            f"In {folder.path}: loss.png, sample.txt, metrics.jsonl, summary.json, checkpoints, tensorboard."
            f" Next: mars {following}"
        )


def _say_how_to_continue(folder: RunFolder, interrupted: Interrupted) -> None:
    print(f"\n{str(interrupted).capitalize()}. Continue with: mars train --resume {folder.path}", file=sys.stderr)
    sys.exit(interrupted.exit_code)


if __name__ == "__main__":
    keep_freed_memory()
    with reported(f"mars (rank {os.environ['RANK']})" if were_launched() else "mars"):
        main(sys.argv[1:])
