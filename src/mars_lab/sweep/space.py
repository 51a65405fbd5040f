"""What is tried for each optimizer: learning rates and other hyperparameters, equally many points for all."""

import dataclasses
import math
import typing
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from itertools import product
from typing import Any

from mars_lab.errors import InputError
from mars_lab.training.config import OptimizerConfig

EXACT = "-exact"
_OWNERS = {"gamma": "mars-", "final_gamma": "mars-", "clip_norm": "mars-", "shampoo_eps": "shampoo"}
"""Hyperparameters that some optimizers have alone, and what the names of those begin with."""
_NUMBERS = {
    name: hint
    for name, hint in typing.get_type_hints(OptimizerConfig).items()
    if hint in (float, float | None)  # what can be put on a scale
}

Space = dict[str, list[float]]
"""Values to try, by field of the optimizer's configuration; `lr` is always among them."""


def named_optimizer(name: str, bases: Mapping[str, OptimizerConfig]) -> OptimizerConfig:
    """The optimizer that `name` means: that of a recipe, with `-exact` at the end in exact mode.

    Raises:
        InputError: there is none.
    """
    base = name.removesuffix(EXACT)
    if base not in bases:
        raise InputError(
            f"no optimizer {name!r} to compare; known: {', '.join(bases)}, the MARS types also with {EXACT}"
        )
    return dataclasses.replace(bases[base], mode="exact") if name.endswith(EXACT) else bases[base]


def rates(centre: float, count: int, factor: float) -> list[float]:
    """`count` rates in rising order with `centre` in the middle (of an even number, just above it)."""
    powers = range(-(count // 2), count - count // 2)
    return [float(f"{centre * factor**power:.4g}") for power in powers]


def at(optimizer: OptimizerConfig, point: Mapping[str, float]) -> OptimizerConfig:
    """`optimizer` with the values of `point`; `lr_1d` keeps its ratio to `lr` unless it has a value of its own."""
    lr_1d = None if optimizer.lr_1d is None else optimizer.lr_1d * point.get("lr", optimizer.lr) / optimizer.lr
    return dataclasses.replace(optimizer, **{"lr_1d": lr_1d, **point})


def grid(space: Space) -> list[dict[str, float]]:
    """Every combination."""
    return [dict(zip(space, values, strict=True)) for values in product(*space.values())]


def spaces(
    optimizers: Mapping[str, OptimizerConfig], entries: Sequence[str], num_lrs: int, lr_factor: float
) -> dict[str, Space]:
    """What to try for each optimizer: `num_lrs` rates around its own, and what `entries` say.

    An entry is `FIELD=VALUE,VALUE,...`, for one optimizer `OPTIMIZER:FIELD=...`.

    Raises:
        InputError: an entry that cannot be read, or that means nothing for an optimizer.
    """
    found = {name: {"lr": rates(optimizer.lr, num_lrs, lr_factor)} for name, optimizer in optimizers.items()}
    for entry in entries:
        owner, field, values = _parsed(entry, optimizers)
        for name in [owner] if owner else optimizers:
            prefix = _OWNERS.get(field, "")
            if not optimizers[name].name.startswith(prefix):
                having = [other for other in optimizers if optimizers[other].name.startswith(prefix)]
                remedy = f"write it for the others alone, as in {having[0]}:{entry.rpartition(':')[2]}"
                raise InputError(f"--space {entry}: {name} has no {field}; {remedy if having else 'leave it out'}")
            found[name][field] = values
    for name, space in found.items():
        for point in grid(space):
            at(optimizers[name], point)  # raises where a value is out of range
    return found


def require_equal(counts: Mapping[str, int]) -> int:
    """The number of trials that all optimizers have.

    Raises:
        InputError: they don't have the same.
    """
    if len(set(counts.values())) > 1:
        raise InputError(
            f"unequal budgets: {', '.join(f'{name} has {count} trials' for name, count in counts.items())}; give every "
            "optimizer the same number, for example more learning rates (--space adamw:lr=...) to those with fewer "
            "hyperparameters, or --search tpe --trials N"
        )
    return next(iter(counts.values()))


def _parsed(entry: str, optimizers: Mapping[str, Any]) -> tuple[str, str, list[float]]:
    name, equals, text = entry.partition("=")
    owner, _, field = name.rpartition(":")
    field = field.replace("-", "_")
    try:
        values = [float(value) for value in text.split(",")]
    except ValueError:
        values = []
    if not equals or not values or not all(map(math.isfinite, values)) or len(set(values)) < len(values):
        raise InputError(f"--space {entry!r} must be FIELD=NUMBER,NUMBER,... or OPTIMIZER:FIELD=..., each number once")
    if owner and owner not in optimizers:
        raise InputError(f"--space {entry}: {owner} is none of --optimizers {' '.join(optimizers)}")
    if field not in _NUMBERS:
        near = get_close_matches(field, _NUMBERS, n=1, cutoff=0.0)[0]
        raise InputError(f"--space {entry}: no hyperparameter {field!r}; did you mean {near!r}? {', '.join(_NUMBERS)}")
    return owner, field, sorted(values)
