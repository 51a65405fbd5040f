"""Schedules of gamma, as values, and of the learning rate, as multipliers for `torch.optim.lr_scheduler.LambdaLR`.

All are called with the number of steps already taken (0 before the first) and are frozen, so that they compare,
pickle and print.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Constant:
    """The same `value` at every step."""

    value: float

    def __call__(self, step: int) -> float:
        return self.value


@dataclass(frozen=True)
class Linear:
    """From `start` to `end` in equal steps over `num_steps`, then `end`."""

    start: float
    end: float
    num_steps: int

    def __call__(self, step: int) -> float:
        return self.start + (self.end - self.start) * _progress(step, self.num_steps)


@dataclass(frozen=True)
class Cosine:
    """From `start` to `end` along half a cosine over `num_steps`, then `end`."""

    start: float
    end: float
    num_steps: int

    def __call__(self, step: int) -> float:
        half_cosine = 0.5 * (1.0 + math.cos(math.pi * _progress(step, self.num_steps)))
        return self.end + (self.start - self.end) * half_cosine


@dataclass(frozen=True)
class WarmupConstant:
    """Learning-rate multiplier: linear warm-up to 1, then 1."""

    num_warmup_steps: int

    def __call__(self, step: int) -> float:
        return _warmup(step, self.num_warmup_steps)


@dataclass(frozen=True)
class WarmupCosine:
    """Learning-rate multiplier: linear warm-up to 1, then half a cosine down to `final_ratio` at `num_steps`."""

    num_warmup_steps: int
    num_steps: int
    final_ratio: float = 0.0

    def __call__(self, step: int) -> float:
        if step < self.num_warmup_steps:
            return _warmup(step, self.num_warmup_steps)
        decay = Cosine(1.0, self.final_ratio, self.num_steps - self.num_warmup_steps)
        return decay(step - self.num_warmup_steps)


@dataclass(frozen=True)
class WarmupStableDecay:
    """Learning-rate multiplier: linear warm-up to 1, then 1, then linear to `final_ratio` over the last part."""

    num_warmup_steps: int
    num_steps: int
    final_ratio: float = 0.0
    decay_fraction: float = 0.2

    def __call__(self, step: int) -> float:
        num_decay_steps = round(self.decay_fraction * self.num_steps)
        decay = Linear(1.0, self.final_ratio, num_decay_steps)
        return min(_warmup(step, self.num_warmup_steps), decay(max(0, step - (self.num_steps - num_decay_steps))))


@dataclass(frozen=True)
class WarmupMultiStep:
    """Learning-rate multiplier: linear warm-up to 1, then times `factor` at each of `milestones` (steps)."""

    num_warmup_steps: int
    milestones: tuple[int, ...]
    factor: float = 0.1

    def __call__(self, step: int) -> float:
        return _warmup(step, self.num_warmup_steps) * self.factor ** sum(step >= m for m in self.milestones)


def _progress(step: int, num_steps: int) -> float:
    return min(1.0, step / num_steps) if num_steps > 0 else 1.0


def _warmup(step: int, num_warmup_steps: int) -> float:
    # The first step already moves: a rate of 0 would waste one batch.
    return min(1.0, (step + 1) / num_warmup_steps) if num_warmup_steps > 0 else 1.0


_GAMMA_SCHEDULES: Mapping[str, Callable[..., Callable[[int], float]]] = {
    "constant": Constant,
    "linear": Linear,
    "cosine": Cosine,
}


def to_plain(gamma: Any) -> Any:
    """Return gamma as a checkpoint stores it: numbers and tensors as they are, schedules as plain dicts."""
    for name, cls in _GAMMA_SCHEDULES.items():
        if type(gamma) is cls:
            return {"schedule": name, **asdict(gamma)}
    return {"schedule": "callable"} if callable(gamma) else gamma


def from_plain(plain: Any, current: Any) -> Any:
    """Undo `to_plain`; a callable of the user's own cannot be stored, so `current` is kept for it.

    Raises:
        ValueError: the checkpoint was made with a callable and `current` is not one.
    """
    if not isinstance(plain, dict):
        return plain
    fields: dict[str, Any] = dict(plain)  # pyright: ignore[reportUnknownArgumentType]
    name = fields.pop("schedule")
    if name != "callable":
        return _GAMMA_SCHEDULES[name](**fields)
    if not callable(current):
        raise ValueError(
            "the state dict was saved with a callable gamma, which a checkpoint cannot hold; construct the optimizer "
            f"with the same callable before loading (its gamma is {current!r})"
        )
    return current
