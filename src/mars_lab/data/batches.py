"""Which tokens step `s` sees: a pure function of the seed and the position, so that nothing has to be saved."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mars_lab.data.permutation import Permutation
from mars_lab.errors import InputError

ORDER = 2
"""Changes whenever the order of the sequences does, so that no run continues in another order."""


class TokenStream(Protocol):
    """Tokens in a row; an array is one, and so are files that are read where they are looked at."""

    def __len__(self) -> int: ...

    def __getitem__(self, where: slice, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Windows:
    """Windows of `length` + 1 tokens, each token of the corpus once an epoch, in a new random order each epoch.

    In epoch e the corpus is cut into `per_epoch` windows that start at o_e + i * length, where the offset o_e is
    uniform in [0, length); sequence number n of the run is window p_e(n mod per_epoch) of epoch
    e = n // per_epoch. o_e and the permutation p_e come from (seed, e) alone. A different offset each epoch
    means that a token meets different contexts; what it leaves over at both ends is less than two windows.
    """

    tokens: TokenStream
    length: int
    seed: int

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
        windows = [self.tokens[start : start + self.length + 1] for start in self._starts(first, count)]
        return torch.from_numpy(np.stack(windows).astype(np.int64))

    def _starts(self, first: int, count: int) -> list[int]:
        starts: list[int] = []
        while len(starts) < count:
            epoch, index = divmod(first + len(starts), self.per_epoch)
            offset, order = _epoch(self.seed, epoch, self.length, self.per_epoch)
            indices = np.arange(index, min(index + count - len(starts), self.per_epoch))
            starts += (offset + order(indices) * self.length).tolist()
        return starts


@lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, length: int, per_epoch: int) -> tuple[int, Permutation]:
    """Offset and order of the windows."""
    offset = int(np.random.SeedSequence([seed, epoch, 1]).generate_state(1, np.uint64)[0]) % length
    return offset, Permutation.seeded(per_epoch, seed, epoch)


def evaluation_sequences(tokens: TokenStream, length: int, count: int) -> Tensor:
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
