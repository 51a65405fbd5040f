"""The order of the sequences: each once an epoch, whoever asks for them and in whatever portions."""

from collections import Counter

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mars_lab.data.batches import Windows
from mars_lab.data.permutation import Permutation


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 10**9))
@settings(deadline=None, max_examples=60)
def test_a_permutation_takes_each_value_once(size: int, seed: int, epoch: int) -> None:
    values = Permutation.seeded(size, seed, epoch)(np.arange(size))
    assert np.array_equal(np.sort(values), np.arange(size))


def test_a_permutation_of_trillions_stays_in_range_and_has_no_duplicates() -> None:
    size = 9 * 10**12 + 1
    order = Permutation.seeded(size, 0, 0)
    values = np.concatenate([order(np.arange(begin, begin + 2000)) for begin in (0, size // 2, size - 2000)])
    assert values.min() >= 0
    assert values.max() < size
    assert len(set(values.tolist())) == 6000
    assert abs(values.mean() / size - 0.5) < 5 / np.sqrt(12 * 6000)


def test_a_permutation_is_as_even_as_a_shuffled_deck() -> None:
    """Where each of 7 things lands and who follows whom, over many seeds, against chi-squared's 1 in 10^6 quantiles."""
    places, followers, trials = np.zeros((7, 7)), np.zeros((7, 7)), 7000
    for seed in range(trials):
        values = Permutation.seeded(7, seed)(np.arange(7))
        places[np.arange(7), values] += 1
        followers[values[:-1], values[1:]] += 1
    expected = trials / 7
    assert ((places - expected) ** 2 / expected).sum() < 36 + 7 * np.sqrt(72)
    pairs = followers[~np.eye(7, dtype=bool)]
    assert ((pairs - expected) ** 2 / expected).sum() < 41 + 7 * np.sqrt(82)


def test_neighbours_in_the_order_are_strangers_in_the_files() -> None:
    values = Permutation.seeded(100_000, 3)(np.arange(100_000))
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 5 / np.sqrt(100_000)
    assert (np.abs(np.diff(values)) < 10).mean() < 5e-4  # 2e-4 by chance


phases = st.lists(
    st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(0, 4)), min_size=1, max_size=6
)


@given(phases=phases, seed=st.integers(0, 1000), num_tokens=st.integers(40, 700), length=st.integers(1, 20))
@settings(deadline=None, max_examples=60)
def test_no_sequence_is_repeated_or_lost(
    phases: list[tuple[int, int, int, int]], seed: int, num_tokens: int, length: int
) -> None:
    """A run is stopped and continued, each time on other ranks, with another batch size and accumulation."""
    corpus = np.arange(num_tokens, dtype=np.uint16)
    shown: list[torch.Tensor] = []
    for num_ranks, batch_size, accumulation, num_steps in phases:
        ranks = [Windows(corpus, length, seed) for _ in range(num_ranks)]  # new processes
        for _ in range(num_steps * accumulation):
            first = len(shown)
            for rank, windows in enumerate(ranks):
                shown += windows.sequences(first + rank * batch_size, batch_size)
    per_epoch = (num_tokens - length) // length
    for begin in range(0, len(shown), per_epoch):
        epoch = Counter(int(sequence[0]) for sequence in shown[begin : begin + per_epoch])
        assert set(epoch.values()) <= {1}, "repeated within an epoch"
        if len(shown) >= begin + per_epoch:
            # Every one, side by side: each target of the epoch exactly once.
            targets = torch.cat([sequence[1:] for sequence in shown[begin : begin + per_epoch]]).sort().values
            assert torch.equal(targets, torch.arange(int(targets[0]), int(targets[0]) + per_epoch * length))
    uninterrupted = Windows(corpus, length, seed).sequences(0, len(shown)) if shown else None
    assert uninterrupted is None or torch.equal(torch.stack(shown), uninterrupted)


def test_the_order_is_the_same_on_every_machine_and_in_every_version() -> None:
    """Written down: a run continued after an upgrade must go on where it was, or ORDER must change."""
    assert Permutation.seeded(10, 0, 0)(np.arange(10)).tolist() == [4, 6, 8, 9, 0, 2, 5, 7, 3, 1]
    across_epochs = Windows(np.arange(1000, dtype=np.uint16), length=7, seed=5).sequences(140, 4)
    assert across_epochs[:, 0].tolist() == [102, 780, 192, 927]
