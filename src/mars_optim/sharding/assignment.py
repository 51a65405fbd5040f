"""Who computes what, so that all are done at about the same time."""

from __future__ import annotations

from collections.abc import Sequence


def assign(
    works: Sequence[float],
    num_slots: int,
    allowed: Sequence[Sequence[int] | None] | None = None,
    loads: list[float] | None = None,
) -> list[int]:
    """Return the slot of each piece of work: the largest first, each to the slot with the least so far.

    No slot gets more than 4/3 of what the best assignment would give its fullest one, where every slot is allowed
    (Graham 1969). All ranks come to the same result from the same works.

    Args:
        works: how long each takes, in any unit.
        num_slots: how many work side by side.
        allowed: for each work the slots it may go to; None: all.
        loads: what the slots have already; is added to.
    """
    loads = [0.0] * num_slots if loads is None else loads
    slots = [0] * len(works)
    for i in sorted(range(len(works)), key=lambda i: (-works[i], i)):
        candidates = (None if allowed is None else allowed[i]) or range(num_slots)
        slots[i] = min(candidates, key=lambda slot: (loads[slot], slot))
        loads[slots[i]] += works[i]
    return slots
