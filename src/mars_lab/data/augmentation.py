"""Which images step `s` sees, and how each is shifted and mirrored: a pure function of the seed and the position."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mars_lab.data.cifar import SIZE, LabelledImages
from mars_lab.data.permutation import Permutation, keyed_hash

_PADDING = 4
_SHIFTS = 2 * _PADDING + 1


@dataclass(frozen=True)
class AugmentedImages:
    """Training images, each once an epoch in a new random order, cropped after padding by 4 zeros, and mirrored.

    Image number n of the run is image p_e(n mod N) of epoch e = n // N. Its shift, one of 9 x 9, and whether it is
    mirrored are bits of a hash of n, so that no batch depends on those before it.
    """

    images: LabelledImages
    seed: int
    is_augmented: bool = True

    def sequences(self, first: int, count: int) -> Tensor:
        """Images number `first` to `first + count - 1` of the run, as `packed` has them."""
        numbers = np.arange(first, first + count)
        epochs, positions = np.divmod(numbers, len(self.images.labels))
        chosen = np.empty(count, np.int64)
        for epoch in np.unique(epochs):
            order = Permutation.seeded(len(self.images.labels), self.seed, int(epoch))
            chosen[epochs == epoch] = order(positions[epochs == epoch])
        pixels = self.images.pixels[chosen]
        if self.is_augmented:
            pixels = self._moved(pixels, numbers)
        return packed(LabelledImages(pixels, self.images.labels[chosen]))

    def _moved(self, pixels: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        key = np.random.SeedSequence([self.seed, 2]).generate_state(1, np.uint64)[0]
        draws = keyed_hash(numbers.astype(np.uint64), key)
        is_mirrored = (draws & np.uint64(1)).astype(bool)
        down, right = np.divmod((draws >> np.uint64(1)) % np.uint64(_SHIFTS**2), np.uint64(_SHIFTS))
        padded = np.pad(pixels, ((0, 0), (0, 0), (_PADDING, _PADDING), (_PADDING, _PADDING)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (SIZE, SIZE), axis=(2, 3))
        moved = windows[np.arange(len(pixels)), :, down.astype(np.int64), right.astype(np.int64)]
        moved[is_mirrored] = moved[is_mirrored, :, :, ::-1]
        return moved


def packed(images: LabelledImages) -> Tensor:
    """One row an image: its pixels, then its label; uint8 (count, 3 * 32 * 32 + 1)."""
    rows = images.pixels.reshape(len(images.labels), -1)
    return torch.from_numpy(np.concatenate((rows, images.labels[:, None]), axis=1))


def unpacked(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Undo `packed`: pixels in [0, 255], uint8 (count, 3, 32, 32), and labels, int64 (count,)."""
    return rows[:, :-1].unflatten(1, (3, SIZE, SIZE)), rows[:, -1].long()
