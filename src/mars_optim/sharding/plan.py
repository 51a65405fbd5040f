"""Which matrix is computed where, in which round, and what travels for it: arithmetic on boxes, without any rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

from .assignment import assign
from .spread import Box, Cut, intersection, size_of, within

ROUND_ELEMENTS = 1 << 24  # of matrices of one owner that travel together


@dataclass(frozen=True)
class Part:
    """A box of a tensor that is computed by itself."""

    job: int
    box: Box
    work: float


@dataclass(frozen=True)
class Piece:
    """What of a part one rank holds: where in its own piece of the tensor, and where in the whole part."""

    job: int
    part: int  # among the parts of the round that are its owner's
    held: tuple[slice, ...]
    block: tuple[slice, ...]
    shape: tuple[int, ...]
    size: int


Pieces = tuple[Piece, ...]


@dataclass(frozen=True)
class Round:
    """Parts that travel together, as one rank sees it."""

    mine: tuple[Part, ...]
    outgoing: tuple[Pieces, ...]  # by rank of the shard group: what I hold of what it computes
    incoming: tuple[Pieces, ...]  # by rank of the shard group: what it holds of what I compute
    results: tuple[Pieces, ...]  # by replica: what I hold of what its ranks compute


def sizes_of(pieces: Pieces | list[Piece]) -> list[int]:
    """Return the numbers of elements."""
    return [piece.size for piece in pieces]


@lru_cache(maxsize=64)
def make_plan(
    parts: tuple[Part, ...], cuts: tuple[Cut, ...], num_replicas: int, me: tuple[int, int]
) -> tuple[Round, ...]:
    """Return the rounds as the rank `me` = (replica, shard) takes part in them.

    A part that one shard has all of is computed there, by one of its replicas; the others go to whoever is free.

    Args:
        parts: of all jobs, in the same order on all ranks.
        cuts: for each job, what of it each rank of a shard group holds.
        num_replicas: how many hold the same.
        me: whose view is wanted.
    """
    boxes = [cut.boxes for cut in cuts]
    num_shards = len(boxes[0])
    owners = _owners(parts, boxes, num_replicas)
    filled: dict[tuple[int, int], tuple[int, int]] = {}
    rounds: list[dict[tuple[int, int], list[Part]]] = [{}]
    for i in sorted(range(len(parts)), key=lambda i: (-parts[i].work, i)):
        which, used = filled.get(owners[i], (0, 0))
        size = size_of(parts[i].box)
        if used and used + size > ROUND_ELEMENTS:
            which, used = which + 1, 0
        filled[owners[i]] = (which, used + size)
        rounds += [{} for _ in range(which + 1 - len(rounds))]
        rounds[which].setdefault(owners[i], []).append(parts[i])
    replica, shard = me

    def pieces(owned: dict[tuple[int, int], list[Part]], owner: tuple[int, int], holder: int) -> Pieces:
        return _pieces(owned.get(owner, ()), boxes, holder)

    return tuple(
        Round(
            mine=tuple(owned.get(me, ())),
            outgoing=tuple(pieces(owned, (replica, s), shard) for s in range(num_shards)),
            incoming=tuple(pieces(owned, me, s) for s in range(num_shards)),
            results=tuple(
                tuple(piece for s in range(num_shards) for piece in pieces(owned, (r, s), shard))
                for r in range(num_replicas)
            ),
        )
        for owned in rounds
    )


def _owners(parts: Sequence[Part], boxes: Sequence[Sequence[Box]], num_replicas: int) -> list[tuple[int, int]]:
    num_shards = len(boxes[0])
    num_slots = num_replicas * num_shards
    allowed: list[Sequence[int] | None] = []
    for part in parts:
        shards = (s for s, box in enumerate(boxes[part.job]) if intersection(box, part.box) is not None)
        holders = list(islice(shards, 2))
        allowed.append(range(holders[0], num_slots, num_shards) if len(holders) == 1 else None)
    slots = assign([part.work for part in parts], num_slots, allowed)
    return [divmod(slot, num_shards) for slot in slots]


def _pieces(parts: Sequence[Part], boxes: Sequence[Sequence[Box]], holder: int) -> Pieces:
    """What the `holder` of a shard group has of `parts`."""
    pieces: list[Piece] = []
    for i, part in enumerate(parts):
        held = boxes[part.job][holder]
        shared = intersection(held, part.box)
        if shared is not None:
            shape = tuple(stop - start for start, stop in shared)
            pieces.append(Piece(part.job, i, within(shared, held), within(shared, part.box), shape, size_of(shared)))
    return tuple(pieces)
