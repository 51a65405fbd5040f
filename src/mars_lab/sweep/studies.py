"""The trials of a sweep in Optuna's storage: one study an optimizer."""

import logging
from functools import cache

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, OperationalError

from mars_lab.errors import InputError
from mars_lab.sweep import space
from mars_lab.sweep.plan import Plan

logging.getLogger("optuna").setLevel(logging.WARNING)

DIVERGED = float("inf")
"""The value of a trial whose loss was not finite any more: worse than all others."""


class Studies:
    """Asks for points to try and is told what they came to."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._storage = _storage(plan.storage)
        self._study = cache(self._opened)

    def trials(self, optimizer: str) -> list[FrozenTrial]:
        """All of them so far, by number."""
        return self._study(optimizer).get_trials(deepcopy=False)

    def ask(self, optimizer: str) -> Trial:
        """A new trial; of a grid the next point."""
        study = self._study(optimizer)
        if self._plan.config.search != "grid":
            return self._with_point(optimizer, study.ask())
        # A trial that waits in Optuna's queue would be left there by a process that ends here; this is one insertion.
        own = self._plan.spaces[optimizer]
        point = space.grid(own)[len(self.trials(optimizer))]
        distributions: dict[str, BaseDistribution] = {**self._distributions(own)}
        study.add_trial(create_trial(state=TrialState.RUNNING, params=point, distributions=distributions))
        return self.reopened(optimizer, self.trials(optimizer)[-1])

    def reopened(self, optimizer: str, trial: FrozenTrial) -> Trial:
        """A trial that another process began."""
        return self._with_point(optimizer, Trial(self._study(optimizer), trial._trial_id))

    def tell(self, optimizer: str, number: int, value: float | None) -> None:
        """What the trial came to; None if it was pruned."""
        study = self._study(optimizer)
        study.tell(number, value, state=TrialState.PRUNED if value is None else TrialState.COMPLETE)

    def best(self, optimizer: str) -> dict[str, float] | None:
        """The point with the lowest value; None if every trial diverged."""
        complete = [t for t in self.trials(optimizer) if t.state == TrialState.COMPLETE and t.value is not None]
        best = min(complete, key=lambda trial: trial.value or 0.0, default=None)
        return None if best is None or best.value == DIVERGED else best.params

    def _with_point(self, optimizer: str, trial: Trial) -> Trial:
        """`trial` with a value of every hyperparameter: those that it has, and new ones."""
        for field, values in self._distributions(self._plan.spaces[optimizer]).items():
            if isinstance(values, FloatDistribution):
                trial.suggest_float(field, values.low, values.high, log=values.log)
            else:
                trial.suggest_categorical(field, values.choices)
        return trial

    def _opened(self, optimizer: str) -> optuna.Study:
        return optuna.create_study(
            storage=self._storage,
            study_name=f"{self._plan.folder.resolve().name}/{optimizer}",
            sampler=self._sampler(),
            pruner=_pruner(self._plan.config.prune),
            load_if_exists=True,
        )

    def _sampler(self) -> BaseSampler:
        seed = self._plan.config.base.train.seed
        return TPESampler(seed=seed) if self._plan.config.search == "tpe" else RandomSampler(seed=seed)

    def _distributions(self, own: space.Space) -> dict[str, FloatDistribution | CategoricalDistribution]:
        if self._plan.config.search == "grid":
            return {field: CategoricalDistribution(values) for field, values in own.items()}
        return {
            field: FloatDistribution(min(values), max(values), log=True)
            if field == "lr"
            else CategoricalDistribution(values)
            for field, values in own.items()
        }


def _storage(url: str) -> RDBStorage:
    options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    try:
        return RDBStorage(url, engine_kwargs=options)
    except (ArgumentError, NoSuchModuleError, OperationalError, ImportError) as error:
        raise InputError(
            f"--storage {url} cannot be opened ({str(error).splitlines()[0]}); it must be a database as SQLAlchemy "
            "names it, such as sqlite:////path/trials.db or postgresql://user@host/name, with its driver installed"
        ) from None


def _pruner(name: str) -> BasePruner:
    if name == "no":
        return NopPruner()
    return MedianPruner(n_startup_trials=2) if name == "median" else SuccessiveHalvingPruner()
