"""Which runs differ in their seed alone, and how to call what else they differ in."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from mars_lab.report.run_record import RunRecord

_SEED = "train.seed"
_OPTIMIZER = ("optimizer.name", "optimizer.mode", "optimizer.label")
_NEVER_NAMED = (
    "train.device",
    "train.num_checkpoints",
    "train.checkpoint_every",
    "train.timeout",
    "task.data.cache",
    "task.eval_batch_size",
    "task.sample_tokens",
    "task.sample_prompt",
)
"""What changes where and how a run is computed and stored, not what comes out."""
_FOLLOWERS = {"optimizer.lr_1d": "optimizer.lr"}
"""A rate that is the same multiple of another everywhere need not be named beside it."""


@dataclass(frozen=True)
class Setting:
    """Runs of one optimizer that differ in their seed alone.

    `label` names the optimizer and what distinguishes this setting; `options` are the flattened configuration.
    """

    label: str
    optimizer: str
    options: dict[str, Any]
    runs: tuple[RunRecord, ...]

    @property
    def is_tuning(self) -> bool:
        """Whether it chose hyperparameters."""
        return all(run.is_tuning for run in self.runs)

    @property
    def circumstances(self) -> dict[str, Any]:
        """The options that are not the optimizer's: two settings can be compared where they are equal."""
        ignored = (_SEED, *_NEVER_NAMED)
        return {k: v for k, v in self.options.items() if not k.startswith("optimizer.") and k not in ignored}

    @property
    def finals(self) -> list[float]:
        """Final validation losses, one a finished run."""
        return [run.final_loss for run in self.runs if run.final_loss is not None]

    @property
    def mean(self) -> float | None:
        """Of the final losses."""
        return fmean(self.finals) if self.finals else None

    @property
    def spread(self) -> float | None:
        """Sample standard deviation of the final losses over seeds."""
        return stdev(self.finals) if len(self.finals) > 1 else None


def group(runs: Sequence[RunRecord]) -> list[Setting]:
    """The settings among `runs`, those of one optimizer next to each other, in the order of the runs."""
    options = {run.name: flatten(run.config) for run in runs}
    families: dict[str, list[RunRecord]] = defaultdict(list)
    for run in runs:
        families[run.optimizer].append(run)
    everywhere = {key for key in differing(list(options.values())) if not key.startswith("optimizer.")}
    settings: list[Setting] = []
    for optimizer, members in families.items():
        own = differing([options[run.name] for run in members])
        named = sorted((own | everywhere) - {_SEED, *_OPTIMIZER, *_NEVER_NAMED}, key=_order)
        named = _without_followers(named, [options[run.name] for run in members])
        groups: dict[tuple[Any, ...], list[RunRecord]] = defaultdict(list)
        for run in members:
            key = (run.is_tuning, *(repr(options[run.name].get(name)) for name in sorted(own - {_SEED, *_NEVER_NAMED})))
            groups[key].append(run)
        for chosen in groups.values():
            values = options[chosen[0].name]
            parts = [f"{name.rsplit('.', 1)[-1]} {_short(values.get(name))}" for name in named]
            label = ", ".join([optimizer, *parts]) + (" (tuning)" if chosen[0].is_tuning else "")
            settings.append(Setting(label, optimizer, values, tuple(chosen)))
    return settings


def best(settings: Sequence[Setting]) -> dict[str, Setting]:
    """By optimizer, the setting that stands for it: of those with the most finished seeds the lowest mean loss.

    An optimizer that has none is left out. Tuning runs don't count where there are others.
    """
    has_results = any(not setting.is_tuning for setting in settings)
    chosen: dict[str, Setting] = {}
    for setting in settings:
        if setting.mean is None or (setting.is_tuning and has_results):
            continue
        rival = chosen.get(setting.optimizer)
        if rival is None or (-len(setting.finals), setting.mean) < (-len(rival.finals), rival.mean):
            chosen[setting.optimizer] = setting
    return dict(sorted(chosen.items(), key=lambda item: item[1].mean or 0.0))


def differing(configurations: Sequence[Mapping[str, Any]]) -> set[str]:
    """Keys that don't have the same value everywhere."""
    keys = {key for options in configurations for key in options}
    return {key for key in keys if len({repr(options.get(key)) for options in configurations}) > 1}


def flatten(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested dicts as one, keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{path}{key}.") if isinstance(value, Mapping) else {f"{path}{key}": value}
    return flat


def _without_followers(named: list[str], configurations: Sequence[Mapping[str, Any]]) -> list[str]:
    def follows(key: str) -> bool:
        leader = _FOLLOWERS.get(key)
        if leader not in named:
            return False
        pairs = [(options.get(key), options.get(leader)) for options in configurations]
        return len({None if a is None or not b else float(f"{a / b:.3g}") for a, b in pairs}) == 1

    return [key for key in named if not follows(key)]


def _order(key: str) -> tuple[bool, bool, str]:
    return key != "optimizer.lr", not key.startswith("optimizer."), key


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "/".join(map(_short, value)) if isinstance(value, list) else str(value)
