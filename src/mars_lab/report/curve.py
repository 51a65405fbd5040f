"""A measure over the course of a run, and how it is thinned for display."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """`value` after `steps` steps, `tokens` tokens and `seconds` seconds in steps; all of one length, rising."""

    steps: Array
    tokens: Array
    seconds: Array
    value: Array

    def __len__(self) -> int:
        return len(self.value)

    def at(self, indices: NDArray[np.intp]) -> Self:
        """The points number `indices`."""
        return type(self)(self.steps[indices], self.tokens[indices], self.seconds[indices], self.value[indices])

    def thinned(self, num_points: int) -> Self:
        """At most `num_points` of the points: the lowest and the highest of equal stretches, the first and the last.

        Peaks and troughs stay where and as high as they are, which averages would hide.
        """
        if len(self) <= num_points:
            return self
        num_stretches = max(1, (num_points - 2) // 2)
        length = -(-len(self) // num_stretches)
        padding = length * num_stretches - len(self)
        # The last value once more, which is neither a new lowest nor a new highest.
        stretches = np.append(self.value, np.full(padding, self.value[-1])).reshape(num_stretches, length)
        starts = np.arange(num_stretches) * length
        picked = np.concatenate([starts + stretches.argmin(1), starts + stretches.argmax(1), [0, len(self) - 1]])
        return self.at(np.unique(np.minimum(picked, len(self) - 1)))

    def reaches(self, target: float) -> float:
        """Tokens after which `value` first is `target` or lower, between two points in proportion; inf for never."""
        is_below = self.value <= target
        i = int(is_below.argmax())
        if not is_below[i]:
            return float("inf")
        if i == 0:
            return float(self.tokens[0])
        share = (self.value[i - 1] - target) / (self.value[i - 1] - self.value[i])
        return float(self.tokens[i - 1] + share * (self.tokens[i] - self.tokens[i - 1]))
