"""The same budget for several optimizers.

Each optimizer gets `num_lrs` runs with the first seed, at its recipe's learning rate times powers of `lr_factor`;
the rate with the lowest final validation loss then runs with the other seeds. That is num_lrs + num_seeds - 1 runs
of equally many tokens for each. Every run is an ordinary run folder; finished ones are not repeated.
"""

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from mars_lab.errors import DivergenceError, InputError
from mars_lab.report import comparison
from mars_lab.sweep.space import EXACT, at, named_optimizer, rates
from mars_lab.tasks.language import LanguageConfig
from mars_lab.training import launch, run_folder
from mars_lab.training.config import OptimizerConfig, RunConfig, TrainConfig
from mars_lab.training.progress import clock
from mars_lab.training.run_folder import RunFolder

_ALL = ("adamw", "muon", "mars-adamw", "mars-lion", "mars-shampoo", "mars-m")


@dataclass(frozen=True)
class CompareConfig:
    """What is compared, on what, and with how many runs."""

    task: Annotated[LanguageConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: LanguageConfig(sample_tokens=0)
    )
    train: TrainConfig = field(default_factory=lambda: TrainConfig(num_steps=100, eval_every=20, num_checkpoints=1))
    optimizers: tuple[str, ...] = (*_ALL, *(name + EXACT for name in _ALL if name.startswith("mars-")))
    """Recipe names; with -exact at the end for exact mode."""
    num_lrs: int = 3
    """Learning rates tried for each, centred on the recipe's; lr_1d keeps its ratio to lr."""
    lr_factor: float = 2.0
    """Ratio of neighbouring learning rates."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """The first is the one the learning rate is chosen with."""

    def __post_init__(self) -> None:
        if not self.optimizers or not self.seeds or self.num_lrs < 1 or self.lr_factor <= 1:
            raise InputError(
                "compare needs at least one of --optimizers, of --seeds and of --num-lrs, and --lr-factor above 1; "
                f"got {self.optimizers}, {self.seeds}, {self.num_lrs} and {self.lr_factor}"
            )
        for name, values in (("optimizers", self.optimizers), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise InputError(f"--{name} names one twice: {' '.join(map(str, values))}; each run counts once")


def compare(config: CompareConfig, bases: Mapping[str, OptimizerConfig], folder: Path) -> str:
    """Run the plan in `folder`, write runs.jsonl, compare.json, compare.md and the figure; return the table.

    Args:
        config: the plan.
        bases: the optimizers by recipe name, with the learning rates to centre on.
        folder: gets the run folders and the results; the same call again continues.

    Raises:
        InputError: an optimizer that isn't in `bases`, or a folder that holds runs of another plan.
        Interrupted: Ctrl-C or SIGTERM.
    """
    optimizers = {name: named_optimizer(name, bases) for name in config.optimizers}
    runner = _Runner(config, optimizers, folder)
    for name, optimizer in optimizers.items():
        tried = [runner.run(name, lr, config.seeds[0]) for lr in rates(optimizer.lr, config.num_lrs, config.lr_factor)]
        best = min(tried, key=lambda row: math.inf if row["val_loss"] is None else row["val_loss"])
        for seed in config.seeds[1:]:
            runner.run(name, best["lr"], seed)
    results = RunFolder(folder)
    results.write("runs.jsonl", "".join(json.dumps(row) + "\n" for row in runner.rows))
    entries = comparison.aggregate(folder / "runs.jsonl")
    table = comparison.table(entries)
    results.write("compare.json", json.dumps(entries, indent=2) + "\n")
    results.write("compare.md", table)
    comparison.draw(folder / "runs.jsonl", folder / "compare")
    return table


class _Runner:
    """Runs what isn't finished, and says how far the whole plan has come."""

    def __init__(self, config: CompareConfig, optimizers: dict[str, OptimizerConfig], folder: Path) -> None:
        self.rows: list[dict[str, Any]] = []
        self._train = config.train.resolved()
        self._config, self._optimizers, self._folder = config, optimizers, folder
        self._num_runs = len(optimizers) * (config.num_lrs + len(config.seeds) - 1)
        self._seconds: list[float] = []

    def run(self, name: str, lr: float, seed: int) -> dict[str, Any]:
        """The result of one run as a row, from its folder if it's finished, otherwise by running it."""
        optimizer = self._optimizers[name]
        optimizer = at(optimizer, {"lr": lr})
        train = dataclasses.replace(self._train, seed=seed)
        run_name = f"{name}-lr{lr:g}-seed{seed}"
        folder = self._open(run_name, RunConfig(self._config.task, optimizer, train))
        if (summary := folder.summary()) is None:
            self._announce(run_name)
            begin = time.monotonic()
            try:
                summary = launch.resume(folder, quiet=True)
            except DivergenceError as error:
                # A rate too high is a result of the comparison, not the end of it.
                print(f"  {error}")
                summary = {"val_loss": None, "diverged": str(error)}
                folder.write("summary.json", json.dumps(summary, indent=2) + "\n")
            self._seconds.append(time.monotonic() - begin)
        row = {"optimizer": name, "lr": lr, "seed": seed, "folder": run_name, **summary}
        self.rows.append(row)
        return row

    def _open(self, run_name: str, config: RunConfig) -> RunFolder:
        folder = RunFolder(self._folder / run_name)
        if not (folder.path / "config.json").exists():
            return run_folder.create(self._folder, run_name, config, numbered=False)
        if folder.config() != config:
            raise InputError(f"{folder.path} was run with other settings; give this comparison another --name")
        return folder

    def _announce(self, run_name: str) -> None:
        left = ""
        if self._seconds:
            remaining = (self._num_runs - len(self.rows)) * sum(self._seconds) / len(self._seconds)
            left = f", about {clock(remaining)} left"
        print(f"run {len(self.rows) + 1} of {self._num_runs}: {run_name}{left}", flush=True)
