"""The same numbers on several processes as on one, in every layout; and the plan that says who computes what."""

from __future__ import annotations

import itertools
import os
from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mars_optim.costs import TensorSpec, sharded_step
from mars_optim.sharding import Cut, Part, assign, make_plan, sizes_of
from sharded_checks import CASES, LAYOUTS, run


@pytest.mark.slow
@pytest.mark.parametrize("world", LAYOUTS)
def test_many_processes_give_the_numbers_of_one(world: int) -> None:
    rows = os.environ.get("EQUALITY_ROWS", "")  # tests/mutants.py asks for some of them
    bounds = {case.name: case.tolerance for case in CASES if case.world == world and rows in case.name}
    results = run(world, rows)
    assert results.keys() == bounds.keys()
    wrong = {name: result for name, result in results.items() if isinstance(result, str) or not result <= bounds[name]}
    assert not wrong, "\n".join(f"{name}: {result}" for name, result in wrong.items())


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=9), st.integers(1, 4))
@example([1.0, 1.0, 2.0], 2)
def test_nobody_works_much_longer_than_needed(works: list[float], num_slots: int) -> None:
    def longest(slots: tuple[int, ...] | list[int]) -> float:
        return max(sum(w for w, s in zip(works, slots, strict=True) if s == slot) for slot in range(num_slots))

    found = longest(assign(works, num_slots))
    if len(works) <= 6:
        best = min(longest(slots) for slots in itertools.product(range(num_slots), repeat=len(works)))
        assert found <= 4 / 3 * best * (1 + 1e-12)
    assert found <= sum(works) / num_slots + max(works)


@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 3), st.integers(1, 6))
def test_every_element_travels_once_and_returns(rows: int, num_shards: int, num_replicas: int, count: int) -> None:
    size = -(-rows // num_shards)
    bounds = [(min(i * size, rows), min((i + 1) * size, rows)) for i in range(num_shards)]
    cuts = tuple(Cut(tuple((pair, (0, 3)) for pair in bounds)) for _ in range(count))
    parts = tuple(Part(i, ((0, rows), (0, 3)), float(i + 1)) for i in range(count))
    views = {
        (replica, shard): make_plan(parts, cuts, num_replicas, (replica, shard))
        for replica in range(num_replicas)
        for shard in range(num_shards)
    }
    computed = Counter(part.job for rounds in views.values() for r in rounds for part in r.mine)
    assert computed == Counter(range(count))
    for (replica, shard), rounds in views.items():
        for i, r in enumerate(rounds):
            for other in range(num_shards):  # what one says it sends, the other expects
                assert sizes_of(r.outgoing[other]) == sizes_of(views[replica, other][i].incoming[shard])
        held = Counter(piece.job for r in rounds for pieces in r.results for piece in pieces)
        start, stop = bounds[shard]
        assert held == (Counter(range(count)) if stop > start else Counter())
        numel = sum(piece.size for r in rounds for pieces in r.results for piece in pieces)
        assert numel == count * (stop - start) * 3


@pytest.mark.parametrize("num_shards", [2, 4])
def test_coded_matrices_go_and_return_in_the_bytes_of_one_exchange_in_bf16(num_shards: int) -> None:
    width = 64
    layer = [TensorSpec((3 * width, width), ("split", 0, (width,) * 3))]
    layer += [TensorSpec(shape, "flatten") for shape in ((width, width), (4 * width, width), (width, 4 * width))]
    coded, plain = (
        sum(
            sharded_step(layer, num_shards=num_shards, rank=(0, rank), exchange_precision=precision).all_to_all_bytes
            for rank in range(num_shards)
        )
        for precision in ("8bit", "bf16")
    )
    one_way = 2 * sum(spec.numel for spec in layer)
    assert plain == 2 * one_way
    assert coded == one_way


def test_a_matrix_that_one_rank_holds_stays_there() -> None:
    experts = TensorSpec((4, 64, 64), "stack")
    costs = [sharded_step([experts], num_shards=4, rank=(0, shard)) for shard in range(4)]
    assert len({cost.multiply_adds for cost in costs}) == 1
    cut = Cut(tuple(((i, i + 1), (0, 64), (0, 64)) for i in range(4)))
    parts = tuple(Part(0, ((i, i + 1), (0, 64), (0, 64)), 1.0 + i) for i in range(4))
    (only,) = make_plan(parts, (cut,), 1, (0, 2))
    assert [sizes_of(pieces) for pieces in only.outgoing] == [[], [], [64 * 64], []]
