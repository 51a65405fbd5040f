"""A random order of arbitrarily many things, computed for each of them when it is asked for."""

from dataclasses import dataclass

import numpy as np

_NUM_ROUNDS = 8
"""Each half of the bits is changed four times; four rounds in all already make a Feistel network pseudo-random."""


@dataclass(frozen=True)
class Permutation:
    """A pseudo-random permutation p of 0 ... size - 1 that keeps nothing but its `keys`.

    A Feistel network of keyed hashes permutes the numbers of k bits, 2**(k-1) < size <= 2**k; a result outside
    the range is put through it again until it is inside (cycle walking, fewer than two passes on average), which
    permutes the range. A shuffled list of a trillion tokens' windows would take gigabytes on every rank; shuffling
    blocks of neighbours takes little too, but shows together what stands together in the files.

    References: Luby and Rackoff, 1988 (four rounds suffice); Black and Rogaway, 2002 (cycle walking).
    """

    size: int
    keys: np.ndarray
    """uint64, one a round."""

    @classmethod
    def seeded(cls, size: int, *seed: int) -> "Permutation":
        """The permutation that belongs to the numbers `seed`, the same on every machine."""
        return cls(size, np.random.SeedSequence(seed).generate_state(_NUM_ROUNDS, np.uint64))

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """p(i) for each i of `indices`, all of them in [0, size)."""
        values = self._network(indices.astype(np.uint64))
        while (outside := values >= self.size).any():
            values[outside] = self._network(values[outside])
        return values.astype(np.int64)

    def _network(self, values: np.ndarray) -> np.ndarray:
        num_bits = max(1, (self.size - 1).bit_length())
        num_low = np.uint64(num_bits // 2)
        low_mask = np.uint64((1 << (num_bits // 2)) - 1)
        high_mask = np.uint64((1 << (num_bits - num_bits // 2)) - 1)
        low, high = values & low_mask, values >> num_low
        for i, key in enumerate(self.keys):
            if i % 2:
                low = low ^ (keyed_hash(high, key) & low_mask)
            else:
                high = high ^ (keyed_hash(low, key) & high_mask)
        return (high << num_low) | low


def keyed_hash(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """SplitMix64's finaliser of value + key (Steele, Lea and Flood, 2014)."""
    x = values + key
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
