"""From a table or figure to the runs it needs: configurations, seeds and folders."""

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mars_lab.errors import InputError
from mars_lab.recipes import registry
from mars_lab.reproduce.exhibit import Exhibit
from mars_lab.sweep.plan import Plan as SweepPlan
from mars_lab.sweep.plan import SweepConfig
from mars_lab.sweep.progress import Expected
from mars_lab.tasks.language import LanguageConfig
from mars_lab.training.config import RunConfig
from mars_lab.training.run_folder import RunFolder

PUBLISHED = "published"
"""The scale of the papers."""
_RUNS = "runs"
_ELSEWHERE = ("device", "precision", "parallel", "group_size", "timeout", "compile", "num_checkpoints", "wandb")
"""Fields of a training that may have other values where a run is continued."""


@dataclass(frozen=True)
class Plan:
    """An exhibit at a scale, in `root`, which is shared with the other exhibits of that scale.

    `corpus` replaces what the runs read; `num_lrs` is None where recipes are run as they are.
    """

    exhibit: Exhibit
    scale: str
    root: Path
    num_seeds: int = 1
    corpus: str | None = None
    num_lrs: int | None = None
    lr_factor: float = 2.0

    def __post_init__(self) -> None:
        if self.num_seeds < 1 or (self.num_lrs is not None and self.num_lrs < 1) or self.lr_factor <= 1:
            raise InputError(
                "--seeds and --num-lrs must be at least 1, --lr-factor above 1; got "
                f"{self.num_seeds}, {self.num_lrs} and {self.lr_factor}"
            )
        if self.num_lrs is not None and any("-lr-x" in recipe for recipe in self.recipes):
            raise InputError(
                f"{self.exhibit.name} compares learning rates, which --num-lrs {self.num_lrs} would choose anew; "
                "leave it out"
            )

    @property
    def folder(self) -> Path:
        """Of the results."""
        return self.root / self.exhibit.name

    @cached_property
    def recipes(self) -> list[str]:
        """To be trained, each once."""
        return list(dict.fromkeys(row.recipe for row in self.exhibit.runs))

    @cached_property
    def configs(self) -> dict[str, RunConfig]:
        """By recipe, with the first seed."""
        return {recipe: self._config(recipe) for recipe in self.recipes}

    def run(self, recipe: str, index: int) -> RunFolder:
        """The folder of the run of `recipe` with the seed number `index`."""
        if self.num_lrs is not None:
            sweep = self.sweep(recipe)
            return sweep.final_run(recipe, sweep.final_seeds[index])
        return RunFolder(self.root / _RUNS / f"{recipe}-seed{self.configs[recipe].train.seed + index}")

    @property
    def runs(self) -> dict[Path, RunConfig]:
        """Every run without tuning, in the order in which they are done: all rows with the first seed, then others."""
        return {
            self.run(recipe, index).path: dataclasses.replace(
                config, train=dataclasses.replace(config.train, seed=config.train.seed + index)
            )
            for index in range(self.num_seeds)
            for recipe, config in self.configs.items()
        }

    @property
    def expected(self) -> list[Expected]:
        """The same, for those who watch."""
        return [Expected(RunFolder(path), c.train.num_steps, _cost(c)) for path, c in self.runs.items()]

    def sweep(self, recipe: str) -> SweepPlan:
        """The tuning of `recipe`, which all exhibits share."""
        assert self.num_lrs is not None, "asked for"
        base = self.configs[recipe]
        config = SweepConfig(
            base, (recipe,), num_lrs=self.num_lrs, lr_factor=self.lr_factor, seeds=self.num_seeds, storage=None
        )
        folder = self.root / f"tuned-{self.num_lrs}-x{self.lr_factor:g}" / recipe
        return SweepPlan(config, {recipe: base.optimizer}, folder)

    def _config(self, recipe: str) -> RunConfig:
        config = registry.find(recipe if self.scale == PUBLISHED else f"{self.scale}/{recipe}").config
        task = config.task
        if isinstance(task, LanguageConfig):
            data = task.data
            if self.corpus is not None:
                reads = "corpus" if data.tokens is None else "tokens"
                data = dataclasses.replace(data, **{reads: self.corpus})
            task = dataclasses.replace(task, data=data, sample_tokens=0)
        elif self.corpus is not None:
            task = dataclasses.replace(task, data=dataclasses.replace(task.data, path=self.corpus))
        return dataclasses.replace(config, task=task, train=config.train.resolved())


def is_same(begun: RunConfig, wanted: RunConfig) -> bool:
    """Whether a run that was begun is the one that is wanted, perhaps on another machine."""
    train = dataclasses.replace(wanted.train, **{name: getattr(begun.train, name) for name in _ELSEWHERE})
    return begun == dataclasses.replace(wanted, train=train)


def _cost(config: RunConfig) -> float:
    """Roughly, in multiplications: for an estimate of the time left."""
    num_gradients = 2 if config.optimizer.mode == "exact" else 1
    train = config.train
    sequences = num_gradients * train.num_steps * train.batch_size * train.num_accumulation_steps
    if not isinstance(config.task, LanguageConfig):
        return float(sequences * config.task.model.width**2)
    model = config.task.model
    weights = math.prod((12, model.num_layers, model.width, model.width)) + model.vocab_size * model.width
    return float(sequences * model.context_length * weights)
