"""The command `mars`."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from mars_lab.errors import InputError, TrainingError
from mars_lab.prepare import command as prepare
from mars_lab.recipes.registry import DEFAULT, RECIPES, recipe
from mars_lab.sweep.compare import CompareConfig, compare
from mars_lab.tasks.language import continue_text
from mars_lab.training import launch, run_folder
from mars_lab.training.allocator import keep_freed_memory
from mars_lab.training.config import RunConfig
from mars_lab.training.interruption import Interrupted
from mars_lab.training.loop import train
from mars_lab.training.run_folder import RunFolder

_USAGE = """\
usage: mars COMMAND ...   (mars COMMAND --help says more)

  train [RECIPE] [--FIELD VALUE ...]   train a model; RECIPE is a name from `mars recipes`
  train --resume [RUN]                 continue a run, by default the one started last
  sample [RUN] --prompt TEXT           let a trained model write
  compare [--FIELD VALUE ...]          the same budget for several optimizers: table and figure
  prepare SOURCE [PATH]                a corpus of any size as token files: openwebtext, fineweb-edu, books, text, jsonl
  recipes                              list the recipes
"""


@dataclass(frozen=True)
class TrainCommand:
    """Train a model. `mars train --resume [RUN]` continues a run that was stopped."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    name: str | None = None
    """Name of the run's folder; by default the recipe's name and a number."""
    runs: Path = Path("runs")
    """Folder of the runs."""


@dataclass(frozen=True)
class ResumeCommand:
    """Continue a run with the configuration it was started with."""

    run: tyro.conf.Positional[str | None] = None
    """Name or folder of the run; by default the one that was started last."""
    runs: Path = Path("runs")
    """Folder of the runs."""


@dataclass(frozen=True)
class SampleCommand:
    """Let a trained model continue a text."""

    run: tyro.conf.Positional[str | None] = None
    """Name or folder of the run; by default the one that was started last."""
    prompt: str = ""
    """Text to continue; empty starts a new document."""
    num_tokens: int = 200
    temperature: float = 0.8
    """0 always takes the likeliest token."""
    top_k: int | None = 50
    """Choose among this many tokens; None chooses among all."""
    seed: int = 0
    runs: Path = Path("runs")
    """Folder of the runs."""


@dataclass(frozen=True)
class CompareCommand:
    """Give several optimizers the same budget and compare them; the same command again continues it."""

    config: Annotated[CompareConfig, tyro.conf.arg(name="")] = field(default_factory=CompareConfig)
    name: str = "compare"
    """Name of the folder that gets the runs, the table and the figure."""
    runs: Path = Path("runs")
    """Folder of the runs."""


def _train(args: list[str]) -> None:
    if "--resume" in args:
        args.remove("--resume")
        _resume(tyro.cli(ResumeCommand, args=args, prog="mars train --resume"))
        return
    name = args.pop(0) if args and not args[0].startswith("-") else DEFAULT
    default = TrainCommand(config=recipe(name))
    command = tyro.cli(TrainCommand, args=args, default=default, prog=f"mars train {name}")
    config = dataclasses.replace(command.config, train=command.config.train.resolved())
    task, folder = launch.start(config, command.runs, command.name or name, numbered=command.name is None)
    print(f"Training {folder.path} with {config.optimizer.name} in {config.train.precision}", flush=True)
    _guard(folder, lambda: train(task, config, folder))


def _resume(command: ResumeCommand) -> None:
    folder = run_folder.find(command.runs, command.run)
    if folder.summary() is not None:
        print(f"{folder.path} is finished; there is nothing to resume.")
        return
    print(f"Continuing {folder.path}", flush=True)
    _guard(folder, lambda: launch.resume(folder))


def _guard(folder: RunFolder, work: Callable[[], dict[str, Any]]) -> None:
    try:
        summary = work()
    except Interrupted as interrupted:
        print(f"\n{str(interrupted).capitalize()}. Continue with: mars train --resume {folder.path}", file=sys.stderr)
        sys.exit(interrupted.exit_code)
    print(
        f"Validation loss {summary['val_loss']:.4f} after {summary['steps']} steps, {summary['tokens']:,} tokens, "
        f"{summary['seconds']:.0f} s in steps.\nIn {folder.path}: loss.png, sample.txt, metrics.jsonl, "
        f"summary.json, checkpoints, tensorboard. Next: mars sample {folder.path} --prompt 'We the people'"
    )


def _sample(args: list[str]) -> None:
    command = tyro.cli(SampleCommand, args=args, prog="mars sample")
    task, model = launch.load_model(run_folder.find(command.runs, command.run))
    options = {name: getattr(command, name) for name in ("temperature", "top_k", "seed")}
    print(continue_text(task, model, command.prompt, command.num_tokens, **options))


def _compare(args: list[str]) -> None:
    command = tyro.cli(CompareCommand, args=args, prog="mars compare")
    bases = {name: make().optimizer for name, make in RECIPES.items()}
    try:
        table = compare(command.config, bases, command.runs / command.name)
    except Interrupted as interrupted:
        print(f"\n{str(interrupted).capitalize()}. The same command again continues.", file=sys.stderr)
        sys.exit(interrupted.exit_code)
    print(f"{table}\nIn {command.runs / command.name}: compare.md, compare.json, compare.png, and every run.")


def _prepare(args: list[str]) -> None:
    folder, manifest = prepare.run(tyro.cli(prepare.PrepareCommand, args=args, prog="mars prepare"))
    parts = {part: sum(n for name, n in manifest["tokens"].items() if f"_{part}_" in name) for part in ("train", "val")}
    print(
        f"{folder} has {parts['train']:,} tokens of training and {parts['val']:,} of validation in "
        f"{len(manifest['tokens'])} files. Next: mars train --data.tokens {folder} --model.vocab-size 50304"
    )


def _recipes(args: list[str]) -> None:
    tyro.cli(_nothing, args=args, prog="mars recipes")
    table = Table("recipe", "learning rate", "what it is", box=None, padding=(0, 2, 0, 0))
    for name, make in RECIPES.items():
        mark = " (default)" if name == DEFAULT else ""
        table.add_row(name + mark, f"{make().optimizer.lr:g}", (make.__doc__ or "").splitlines()[0])
    Console().print(table)


def _nothing() -> None:
    """List the recipes that `mars train` takes."""


_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": _train,
    "sample": _sample,
    "compare": _compare,
    "prepare": _prepare,
    "recipes": _recipes,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv` (default: the process's own); a mistake ends it with one line and code 2."""
    keep_freed_memory()
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return
    name = args.pop(0)
    try:
        if name not in _COMMANDS:
            near = get_close_matches(name, _COMMANDS, n=1, cutoff=0.0)[0]
            raise InputError(f"no command {name!r}; did you mean {near!r}? The commands: {', '.join(_COMMANDS)}")
        _COMMANDS[name](args)
    except (InputError, TrainingError) as error:
        print(f"mars: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except OSError as error:
        print(f"mars: {error.strerror or error}: {error.filename or 'while reading or writing'}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("mars: stopped", file=sys.stderr)
        sys.exit(130)
