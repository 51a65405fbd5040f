"""`mars reproduce`: a table or figure of the papers with one command."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from mars_lab.evaluation.command import EvaluateCommand
from mars_lab.recipes.registry import RECIPES
from mars_lab.recipes.scales import SCALES
from mars_lab.report.command import PAGE
from mars_lab.reproduce import catalogue, results, training
from mars_lab.reproduce.exhibit import Exhibit
from mars_lab.reproduce.plan import Plan
from mars_lab.reproduce.results import Questions
from mars_lab.training.interruption import Interrupted


@dataclass(frozen=True)
class ReproduceCommand:
    """Reproduce a table or figure of the papers; without a name, list them. The same command again continues."""

    name: tyro.conf.Positional[str | None] = None
    """Such as mars/gamma."""
    scale: Literal["published", "gpu-hour", "gpu-minutes", "cpu", "smoke"] = "published"
    """How large; what is not `published` is the same made smaller (`mars recipes`)."""
    seeds: int = 1
    """Runs of each row; the papers have one."""
    num_lrs: int | None = None
    """Tune each row first, with as many learning rates around the recipe's; by default recipes run as they are."""
    lr_factor: float = 2.0
    """Ratio of neighbouring learning rates."""
    workers: int = 1
    """Runs at the same time."""
    nproc: int = 1
    """Processes of each run, on this machine; the published runs are for 8 GPUs."""
    corpus: str | None = None
    """What the runs read, if it isn't where `mars prepare` leaves it: text (cpu, smoke), token files, or images."""
    tasks: tuple[str, ...] | None = None
    """Ask the trained models these, as `mars evaluate` does; by default what the table has."""
    shots: tuple[int, ...] = (0,)
    """Numbers of solved examples before each question."""
    data: Path | None = None
    """Folder with the files of the nine tasks; None means the Hugging Face Hub."""
    books: Path | None = None
    """Held-out books for `--tasks books`."""
    num_passages: int = 500
    """Most questions of each task from books."""
    limit: int | None = None
    """Only so many questions of each task."""
    runs: Path = Path("runs")
    """Folder of the runs; those of all tables of a scale lie together in it, under reproduce/SCALE."""

    @property
    def plan(self) -> Plan:
        """What is to be done."""
        assert self.name is not None, "listing needs no plan"
        root = self.runs / "reproduce" / self.scale
        exhibit = catalogue.find(self.name)
        return Plan(exhibit, self.scale, root, self.seeds, self.corpus, self.num_lrs, self.lr_factor)

    def questions(self, exhibit: Exhibit) -> Questions | None:
        """What the trained models are asked; None if nothing."""
        tasks = exhibit.tasks if self.tasks is None else self.tasks
        if not tasks:
            return None
        options = {name: getattr(self, name) for name in ("shots", "data", "books", "num_passages", "limit")}
        return Questions(EvaluateCommand(tasks=tasks, **options))


def main(args: list[str]) -> None:
    """Run `mars reproduce` with `args`."""
    command = tyro.cli(ReproduceCommand, args=args, prog="mars reproduce")
    if command.name is None:
        _list()
        return
    plan = command.plan
    questions = command.questions(plan.exhibit)
    results.check(plan, questions)
    tuned = "" if plan.num_lrs is None else f", tuned with {plan.num_lrs} rates each"
    print(f"{plan.exhibit.name}: {plan.exhibit.shows} ({plan.exhibit.where})")
    print(f"{len(plan.recipes)} rows with {plan.num_seeds} seeds{tuned} in {plan.root}", flush=True)
    try:
        training.train(plan, command.workers, command.nproc)
    except Interrupted as interrupted:
        print(f"\n{str(interrupted).capitalize()}. The same command again continues.", file=sys.stderr)
        sys.exit(interrupted.exit_code)
    print(f"{results.write(plan, questions)}\nOpen {plan.folder / PAGE} in a browser; the table is in table.json, too.")


def _list() -> None:
    print("`mars reproduce NAME` trains all runs of a table or figure at the published scale; smaller, each run:")
    print("".join(f"  --scale {name:12} {scale.hardware}\n" for name, scale in SCALES.items()))
    for name, exhibit in catalogue.EXHIBITS.items():
        hardware = " or ".join(sorted({RECIPES[row.recipe].hardware for row in exhibit.runs}))
        print(f"{name:24} {len(exhibit.runs)} runs, each {hardware}\n  {exhibit.where}\n  {exhibit.shows}")
    print("\nNothing to measure:")
    for entry in catalogue.UNREPRODUCIBLE.values():
        print(f"{entry.name:24} {entry.where}\n  {entry.reason}")
