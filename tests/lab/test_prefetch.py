import threading

import pytest
import torch
from torch import Tensor

from mars_lab.errors import InputError
from mars_lab.training.prefetch import Prefetch


class Source:
    """Counts as it reads, and remembers who read."""

    def __init__(self) -> None:
        self.reads: list[tuple[int, str]] = []
        self.read = threading.Event()

    def batch(self, first: int, count: int) -> Tensor:
        if first == 12:
            raise InputError("tokens.bin is damaged")
        self.reads.append((first, threading.current_thread().name))
        self.read.set()
        return torch.arange(first, first + count)


def test_the_next_batch_is_read_in_a_thread_before_it_is_asked_for() -> None:
    source = Source()
    batches = Prefetch(source.batch, "cpu")
    assert batches.take(0, 4, following=4).tolist() == [0, 1, 2, 3]
    for first in (4, 8):
        while first not in dict(source.reads):
            assert source.read.wait(timeout=30)
            source.read.clear()
        assert batches.take(first, 4, following=first + 4).tolist() == list(range(first, first + 4))
    assert {name.startswith("prefetch") for first, name in source.reads if first > 0} == {True}


def test_an_unforeseen_batch_is_right_too() -> None:
    """Exact mode goes through the batches of a step twice; a resumed run begins anywhere."""
    batches = Prefetch(Source().batch, "cpu")
    for first in (0, 4, 0, 4, 8, 100, 40, 0, 4):
        assert batches.take(first, 4, following=first + 4 if first != 8 else 16).tolist() == list(
            range(first, first + 4)
        )
    assert batches.take(8, 2, following=10).tolist() == [8, 9], "another size than was foreseen"


def test_a_batch_is_read_once() -> None:
    source = Source()
    batches = Prefetch(source.batch, "cpu")
    for first in range(100, 140, 4):
        batches.take(first, 4, following=first + 4)
    del batches
    firsts = [first for first, _ in source.reads]
    assert len(set(firsts)) == len(firsts)


def test_an_error_in_the_thread_reaches_the_loop_with_its_batch() -> None:
    batches = Prefetch(Source().batch, "cpu")
    assert batches.take(4, 4, following=8).tolist() == [4, 5, 6, 7]
    assert batches.take(8, 4, following=12).tolist() == [8, 9, 10, 11]
    with pytest.raises(InputError, match=r"tokens.bin is damaged"):
        batches.take(12, 4, following=16)
