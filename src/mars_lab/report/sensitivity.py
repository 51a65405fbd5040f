"""The final loss as a function of one hyperparameter."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from mars_lab.report.run_record import RunRecord
from mars_lab.report.settings import Setting, differing

_PRINCIPAL = ("optimizer.lr", "optimizer.gamma")
_FOLLOWING = ("optimizer.lr_1d",)


@dataclass(frozen=True)
class Point:
    """Mean, lowest and highest final loss over the seeds at `x`; all None where no run came to an end."""

    x: float
    mean: float | None
    lowest: float | None
    highest: float | None


@dataclass(frozen=True)
class Sensitivity:
    """`lines` by optimizer, in rising order of `x`, which is the hyperparameter called `name`."""

    name: str
    lines: dict[str, list[Point]]


def sensitivities(settings: Sequence[Setting]) -> list[Sensitivity]:
    """One for the learning rate, gamma and every other number of the optimizer that was tried at several values.

    Tuning runs are preferred: the others exist only where the tuning was best. For the same reason only those seeds
    count that every value was tried with, where there are such. Where further hyperparameters differ, a point is the
    best over them.
    """
    families: dict[str, list[Setting]] = defaultdict(list)
    for setting in settings:
        families[setting.optimizer].append(setting)
    found: dict[str, dict[str, list[Point]]] = defaultdict(dict)
    for optimizer, family in families.items():
        members = _comparable([setting for setting in family if setting.is_tuning] or family)
        for key in differing([setting.options for setting in members]):
            if not key.startswith("optimizer.") or key in _FOLLOWING:
                continue
            values = {setting.options.get(key) for setting in members if not isinstance(setting.options.get(key), list)}
            numbers = sorted(v for v in values if isinstance(v, int | float) and not isinstance(v, bool))
            if len(numbers) > 1:
                found[key][optimizer] = [_point(key, x, members) for x in numbers]
    order = sorted(found, key=lambda key: (key not in _PRINCIPAL, key != _PRINCIPAL[0], key))
    return [Sensitivity(key.removeprefix("optimizer."), found[key]) for key in order]


def _comparable(family: Sequence[Setting]) -> list[Setting]:
    """The most that differ in hyperparameters alone."""
    groups: dict[str, list[Setting]] = defaultdict(list)
    for setting in family:
        groups[repr(setting.circumstances)].append(setting)
    return max(groups.values(), key=len)


def _point(key: str, x: float, members: Sequence[Setting]) -> Point:
    shared = set.intersection(*({run.seed for run in setting.runs} for setting in members))
    reached = [
        finals
        for setting in members
        if setting.options.get(key) == x
        and (finals := [loss for run in setting.runs if _counts(run, shared) and (loss := run.final_loss) is not None])
    ]
    if not reached:
        return Point(x, None, None, None)
    finals = min(reached, key=fmean)
    return Point(x, fmean(finals), min(finals), max(finals))


def _counts(run: RunRecord, shared: set[int]) -> bool:
    return not shared or run.seed in shared
