"""Which tokens step `s` sees: a pure function of the seed and the position, so that nothing has to be saved."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mars_lab.errors import InputError


@dataclass(frozen=True)
class Windows:
    """Windows of `length` + 1 tokens, each token of the corpus once an epoch, in a new random order each epoch.

    In epoch e the corpus is cut into `per_epoch` windows that start at o_e + i * length, where the offset o_e is
    uniform in [0, length); sequence number n of the run is window p_e[n mod per_epoch] of epoch
    e = n // per_epoch. o_e and the permutation p_e come from (seed, e) alone. A different offset each epoch
    means that a token meets different contexts; what it leaves over at both ends is less than two windows.
    """

    tokens: np.ndarray
    length: int
    seed: int
    _order: dict[int, tuple[int, np.ndarray]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.per_epoch < 1:
            raise InputError(
                f"the training part has {len(self.tokens)} tokens, too few for one window of "
                f"{self.length} + 1 at every offset ({2 * self.length}); give more text or a smaller "
                "model.context_length"
            )

    @property
    def per_epoch(self) -> int:
        return (len(self.tokens) - self.length) // self.length

    def sequences(self, first: int, count: int) -> Tensor:
        """Sequences number `first` to `first + count - 1` of the run: int64 (count, length + 1)."""
        return torch.stack([self._sequence(number) for number in range(first, first + count)])

    def _sequence(self, number: int) -> Tensor:
        epoch, index = divmod(number, self.per_epoch)
        if epoch not in self._order:
            random = np.random.default_rng([self.seed, epoch])
            self._order.clear()  # Only the current epoch's order is worth its memory.
            self._order[epoch] = (int(random.integers(self.length)), random.permutation(self.per_epoch))
        offset, order = self._order[epoch]
        start = offset + int(order[index]) * self.length
        return torch.from_numpy(self.tokens[start : start + self.length + 1].astype(np.int64))


def evaluation_sequences(tokens: np.ndarray, length: int, count: int) -> Tensor:
    """`count` windows of `length` + 1 tokens spread evenly over `tokens`, the same on each call; 0 means all.

    Raises:
        InputError: `tokens` is shorter than one window.
    """
    available = (len(tokens) - 1) // length
    if available < 1:
        raise InputError(
            f"the validation part has {len(tokens)} tokens, too few for one window of {length} + 1; give more text, "
            "a larger data.val_fraction or a smaller model.context_length"
        )
    count = min(count, available) if count else available
    starts = [(index * available // count) * length for index in range(count)]
    return torch.from_numpy(np.stack([tokens[s : s + length + 1] for s in starts]).astype(np.int64))
