"""The same numbers on several processes as on one, in every layout."""

from __future__ import annotations

import pytest

from sharded_training import CASES, LAYOUTS, run


@pytest.mark.slow
@pytest.mark.parametrize("world", LAYOUTS)
def test_many_processes_give_the_numbers_of_one(world: int) -> None:
    bounds = {case.name: case.tolerance for case in CASES if case.world == world}
    results = run(world)
    assert results.keys() == bounds.keys()
    wrong = {name: result for name, result in results.items() if isinstance(result, str) or not result <= bounds[name]}
    assert not wrong, "\n".join(f"{name}: {result}" for name, result in wrong.items())
