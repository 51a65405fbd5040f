"""The plan of a sweep: what is tuned on what, with how much, and where its runs lie."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mars_lab.errors import InputError
from mars_lab.report.run_record import TUNING_FOLDER
from mars_lab.sweep import space
from mars_lab.training.config import OptimizerConfig, RunConfig, from_dict
from mars_lab.training.run_folder import RunFolder

FINAL_FOLDER = "final"
_PLAN = "sweep.json"
_GROWS = "seeds"


@dataclass(frozen=True)
class SweepConfig:
    """What is tuned, and how."""

    base: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)
    """Task and training, the same for all. Optimizers are chosen by name."""
    optimizers: tuple[str, ...] = ("adamw", "muon", "mars-adamw", "mars-lion", "mars-shampoo", "mars-m")
    """Recipe names; with -exact at the end for exact mode."""
    num_lrs: int = 3
    """Learning rates for each, centred on the recipe's; lr_1d keeps its ratio to lr."""
    lr_factor: float = 2.0
    """Ratio of neighbouring learning rates."""
    space: tuple[str, ...] = ()
    """Further values to try: FIELD=VALUE,VALUE or OPTIMIZER:FIELD=VALUE,VALUE; lr=... replaces the rates above."""
    search: Literal["grid", "random", "tpe"] = "grid"
    """grid tries every combination; random and tpe draw lr between its smallest and largest value."""
    trials: int | None = None
    """random and tpe: trials of each optimizer."""
    prune: Literal["no", "median", "halving"] = "no"
    """End trials early that fall behind those before them (Optuna's median and successive-halving pruners)."""
    seeds: int = 3
    """Runs of each optimizer at its best setting, with other seeds than the tuning's (train.seed)."""
    storage: str | None = None
    """Where trials are recorded: a database as SQLAlchemy names it; by default an SQLite file in the sweep's folder."""

    def __post_init__(self) -> None:
        if not self.optimizers or self.num_lrs < 1 or self.lr_factor <= 1 or self.seeds < 1:
            raise InputError(
                "a sweep needs at least one of --optimizers, of --num-lrs and of --seeds, and --lr-factor above 1; "
                f"got {self.optimizers}, {self.num_lrs}, {self.seeds} and {self.lr_factor}"
            )
        if len(set(self.optimizers)) < len(self.optimizers):
            raise InputError(f"--optimizers names one twice: {' '.join(self.optimizers)}; each counts once")
        if (self.search == "grid") != (self.trials is None) or (self.trials is not None and self.trials < 1):
            raise InputError(
                f"--trials (at least 1) belongs to --search random and tpe, and a grid has as many as points; got "
                f"--search {self.search} with {'no --trials' if self.trials is None else f'--trials {self.trials}'}"
            )


@dataclass(frozen=True)
class Plan:
    """A sweep in its folder. `optimizers` are the configurations by name, before tuning."""

    config: SweepConfig
    optimizers: dict[str, OptimizerConfig]
    folder: Path

    @cached_property
    def spaces(self) -> dict[str, space.Space]:
        """What is tried for each optimizer."""
        c = self.config
        return space.spaces(self.optimizers, c.space, c.num_lrs, c.lr_factor)

    @cached_property
    def num_trials(self) -> int:
        """Of each optimizer, the same for all."""
        if self.config.trials is not None:
            return self.config.trials
        return space.require_equal({name: len(space.grid(own)) for name, own in self.spaces.items()})

    @property
    def all_runs(self) -> list[RunFolder]:
        """Of the tuning, then the final ones."""
        tuning = [self.tuning_run(name, number) for name in self.optimizers for number in range(self.num_trials)]
        return tuning + [self.final_run(name, seed) for name in self.optimizers for seed in self.final_seeds]

    @property
    def storage(self) -> str:
        """The database of the trials."""
        return self.config.storage or f"sqlite:///{(self.folder / 'trials.db').resolve()}"

    def tuning_run(self, optimizer: str, number: int) -> RunFolder:
        """The folder of a trial."""
        return RunFolder(self.folder / TUNING_FOLDER / f"{optimizer}-{number:03}")

    def final_run(self, optimizer: str, seed: int) -> RunFolder:
        """The folder of a run at the best setting."""
        return RunFolder(self.folder / FINAL_FOLDER / f"{optimizer}-seed{seed}")

    @property
    def final_seeds(self) -> list[int]:
        """None of them is the tuning's."""
        return [(self.config.base.train.seed + 1 + i) % 2**32 for i in range(self.config.seeds)]

    def run_config(self, optimizer: str, point: Mapping[str, float], seed: int | None = None) -> RunConfig:
        """`optimizer` at `point`, by default with the tuning's seed."""
        base = self.config.base
        train = base.train if seed is None else dataclasses.replace(base.train, seed=seed)
        return dataclasses.replace(base, optimizer=space.at(self.optimizers[optimizer], point), train=train)


def make(config: SweepConfig, bases: Mapping[str, OptimizerConfig], folder: Path) -> Plan:
    """The plan of `config` in `folder`, checked, with every `auto` replaced; nothing is written yet.

    Raises:
        InputError: an optimizer that isn't in `bases`, or unequal budgets.
    """
    optimizers = {name: space.named_optimizer(name, bases) for name in config.optimizers}
    first = next(iter(optimizers.values()))  # the base's own is nobody's
    base = dataclasses.replace(config.base, train=config.base.train.resolved(), optimizer=first)
    plan = Plan(dataclasses.replace(config, base=base), optimizers, folder)
    _ = plan.num_trials
    return plan


def begin(plan: Plan) -> None:
    """Write `plan` into its folder, or find that it is the one there; more seeds may be asked for later.

    Raises:
        InputError: the folder holds another sweep.
    """
    path = plan.folder / _PLAN
    values = _values(plan)
    if path.exists():
        before = _read(path)
        if {**before, "config": {**before["config"], _GROWS: plan.config.seeds}} != values:
            raise InputError(f"{plan.folder} was begun with other settings; give this sweep another --name")
        if before["config"][_GROWS] > plan.config.seeds:
            raise InputError(
                f"{plan.folder} has {before['config'][_GROWS]} --seeds already; more can be added, not less"
            )
    plan.folder.mkdir(parents=True, exist_ok=True)
    RunFolder(plan.folder).write(_PLAN, json.dumps(values, indent=2) + "\n")


def read(folder: Path) -> Plan:
    """The plan that `begin` wrote."""
    values = _read(folder / _PLAN)
    optimizers = {name: from_dict(OptimizerConfig, options) for name, options in values["optimizers"].items()}
    return Plan(from_dict(SweepConfig, values["config"]), optimizers, folder)


def _values(plan: Plan) -> dict[str, Any]:
    optimizers = {name: dataclasses.asdict(optimizer) for name, optimizer in plan.optimizers.items()}
    return json.loads(json.dumps({"config": dataclasses.asdict(plan.config), "optimizers": optimizers}))


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); restore it, or give this sweep another --name") from None
