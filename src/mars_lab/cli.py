"""The command `mars`."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import tyro

from mars_lab import exchange, train
from mars_lab.drill.faults import FAULTS
from mars_lab.drill.table import Drill, Row, table
from mars_lab.errors import InputError, TrainingError, reported
from mars_lab.evaluation import command as evaluation
from mars_lab.prepare import command as prepare
from mars_lab.recipes import command as recipes
from mars_lab.recipes import registry
from mars_lab.recipes.registry import DEFAULT
from mars_lab.report import command as report
from mars_lab.report import tables
from mars_lab.report.findings import Findings
from mars_lab.reproduce import command as reproduce
from mars_lab.sweep import plan as sweep_plan
from mars_lab.sweep.compare import CompareConfig, compare
from mars_lab.sweep.plan import SweepConfig
from mars_lab.sweep.sweep import sweep
from mars_lab.tasks.language import continue_text
from mars_lab.training import launch, run_folder
from mars_lab.training.allocator import keep_freed_memory
from mars_lab.training.interruption import Interrupted

_USAGE = """\
usage: mars COMMAND ...   (mars COMMAND --help says more)

  train [RECIPE] [--FIELD VALUE ...]   train a model; RECIPE is a name from `mars recipes`
  train --resume [RUN]                 continue a run, by default the one started last
  train ... --nproc N                  the same with N processes on this machine
  sample [RUN] --prompt TEXT           let a trained model write
  compare [--FIELD VALUE ...]          the same budget for several optimizers: table and figure
  sweep [RECIPE] [--FIELD VALUE ...]   tune several optimizers with equal budgets, then run each with several seeds
  reproduce [NAME] [--scale SCALE]     a table or figure of the papers, from its runs to published beside measured
  report RUNS... [--out FOLDER]        runs side by side: a page for the browser, figures, a table
  prepare SOURCE [PATH]                a corpus of any size as token files: openwebtext, fineweb-edu, books, text, jsonl
  evaluate [RUN] --tasks TASKS         the nine tasks of the papers, or questions from held-out books
  evaluate [RUN]                       of a classifier: its test images, by class
  recipes [PATTERN]                    list the recipes
  recipes show NAME                    every field of a recipe, and where it is from
  drill                                break a training in every known way, and see it recover
  export PATH [RUN] [--to hf]          write a run's newest checkpoint as a file of torch.save, or for transformers
  export PATH [RUN] --to safetensors   the same of a classifier, with its classes
  import PATH [RUN]                    make such a file the newest checkpoint of a run, or such a folder a new run
"""


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


@dataclass(frozen=True)
class SweepCommand:
    """Tune several optimizers with equal budgets, then run each at its best with several seeds, and report.

    The same command again continues it. A recipe's name before the flags gives task and training.
    """

    config: Annotated[SweepConfig, tyro.conf.arg(name="")] = field(default_factory=SweepConfig)
    workers: int = 1
    """Processes that train at the same time."""
    name: str = "sweep"
    """Name of the folder that gets the runs and the report."""
    runs: Path = Path("runs")
    """Folder of the runs."""


@dataclass(frozen=True)
class DrillCommand:
    """Inject faults into tiny trainings on two processes and print a row for each."""

    faults: tuple[str, ...] = tuple(FAULTS)
    """Which ones."""


def _sample(args: list[str]) -> None:
    command = tyro.cli(SampleCommand, args=args, prog="mars sample")
    run = run_folder.find(command.runs, command.run)
    task, model = launch.load_model(run, launch.newest_checkpoint(run))
    options = {name: getattr(command, name) for name in ("temperature", "top_k", "seed")}
    print(continue_text(task, model, command.prompt, command.num_tokens, **options))


def _sweep(args: list[str]) -> None:
    name = args.pop(0) if args and not args[0].startswith("-") else DEFAULT
    base = registry.find(name).config
    command = tyro.cli(SweepCommand, args=args, default=SweepCommand(SweepConfig(base)), prog="mars sweep")
    if command.config.base.optimizer != base.optimizer:
        raise InputError("a sweep takes its optimizers from recipes; say what to try with --num-lrs and --space")
    plan = sweep_plan.make(command.config, registry.optimizers_beside(name), command.runs / command.name)
    print(
        f"{plan.num_trials} trials and {plan.config.seeds} seeds of {len(plan.optimizers)} optimizers in {plan.folder}"
    )
    try:
        found = sweep(plan, command.workers)
    except Interrupted as interrupted:
        print(f"\n{str(interrupted).capitalize()}. The same command again continues.", file=sys.stderr)
        sys.exit(interrupted.exit_code)
    _show(found, plan.folder)


def _compare(args: list[str]) -> None:
    command = tyro.cli(CompareCommand, args=args, prog="mars compare")
    try:
        table = compare(command.config, registry.optimizers_beside(DEFAULT), command.runs / command.name)
    except Interrupted as interrupted:
        print(f"\n{str(interrupted).capitalize()}. The same command again continues.", file=sys.stderr)
        sys.exit(interrupted.exit_code)
    print(f"{table}\nIn {command.runs / command.name}: compare.md, compare.json, compare.png, and every run.")


def _report(args: list[str]) -> None:
    command = tyro.cli(report.ReportCommand, args=args, prog="mars report")
    _show(report.run(command), command.out)


def _show(found: Findings, folder: Path) -> None:
    if found.results:
        print(tables.results(found).markdown())
    print("".join(f"{note}\n" for note in found.notes) + f"Open {folder / report.PAGE} in a browser.")


def _drill(args: list[str]) -> None:
    command = tyro.cli(DrillCommand, args=args, prog="mars drill")
    if unknown := set(command.faults) - set(FAULTS):
        raise InputError(f"no fault {min(unknown)!r}; known: {', '.join(FAULTS)}")
    with TemporaryDirectory(prefix="mars-drill-") as folder:
        print("Training undisturbed, as the measure ...", flush=True)
        drill = Drill(Path(folder))
        rows: list[Row] = []
        for number, name in enumerate(command.faults, 1):
            print(f"fault {number} of {len(command.faults)}: {FAULTS[name].what} ...", flush=True)
            rows.append(drill.run(name))
            if not rows[-1].is_good:
                print(rows[-1].output)
    print(table(rows))
    if not all(row.is_good for row in rows):
        raise TrainingError("a fault was not recovered from; what was printed is above")


def _prepare(args: list[str]) -> None:
    folder, manifest = prepare.run(tyro.cli(prepare.PrepareCommand, args=args, prog="mars prepare"))
    parts = {part: sum(n for name, n in manifest["tokens"].items() if f"_{part}_" in name) for part in ("train", "val")}
    print(
        f"{folder} has {parts['train']:,} tokens of training and {parts['val']:,} of validation in "
        f"{len(manifest['tokens'])} files. Next: mars train --data.tokens {folder} --model.vocab-size 50304"
    )


_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": train.main,
    "sample": _sample,
    "export": exchange.export,
    "import": exchange.import_,
    "evaluate": evaluation.main,
    "compare": _compare,
    "sweep": _sweep,
    "report": _report,
    "prepare": _prepare,
    "recipes": recipes.main,
    "reproduce": reproduce.main,
    "drill": _drill,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv` (default: the process's own); a mistake ends it with one line and code 2."""
    keep_freed_memory()
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return
    name = args.pop(0)
    with reported("mars"):
        if name not in _COMMANDS:
            near = get_close_matches(name, _COMMANDS, n=1, cutoff=0.0)[0]
            raise InputError(f"no command {name!r}; did you mean {near!r}? The commands: {', '.join(_COMMANDS)}")
        _COMMANDS[name](args)
