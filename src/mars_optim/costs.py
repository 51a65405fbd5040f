"""What a step costs on many ranks, before anyone has them: what each rank computes and what it moves.

The matrices' part is read off the plan that the step itself follows (`sharding.plan`), the norms' and the parameters'
off the tensors' sizes. `tests/test_sharding.py` counts the collectives of real steps and finds the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .polar import MatrixView, PolarMethod, matrix_shape, parts, polar_work
from .sharding import Cut, Part, assign, make_plan, pads, sizes_of, wires


@dataclass(frozen=True)
class TensorSpec:
    """A parameter: its shape, and how its matrices are seen; `view` None: its step is elementwise."""

    shape: tuple[int, ...]
    view: MatrixView | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class StepCost:
    """Of one rank and one optimizer step. Bytes are what the rank hands to collectives, or keeps."""

    multiply_adds: float = 0.0  # of polar factors
    all_to_all_bytes: int = 0  # sent, both ways, what stays on the rank included
    all_to_alls: int = 0
    all_gather_bytes: int = 0  # contributed, padding included
    all_gathers: int = 0
    broadcast_bytes: int = 0  # sent or received
    broadcasts: int = 0
    all_reduce_bytes: int = 0  # of norms
    all_reduces: int = 0
    state_bytes: int = 0  # momentum, previous gradient and second moment


def sharded_step(
    tensors: Sequence[TensorSpec],
    *,
    num_shards: int,
    num_replicas: int = 1,
    rank: tuple[int, int] = (0, 0),
    how: PolarMethod | None = None,
    exchange_precision: str = "bf16",
    momentum: torch.dtype = torch.float32,
    clips: bool = True,
) -> StepCost:
    """Return what a step costs the rank (replica, shard) where tensors are cut along their first dimension.

    FSDP2 is num_replicas=1, HSDP both, DistributedDataParallel with `process_group` num_shards=1.

    Args:
        tensors: the parameters.
        num_shards: ranks that hold pieces of the same tensors.
        num_replicas: ranks that hold the same pieces.
        rank: whose costs are wanted.
        how: method of the polar factors; None: the default.
        exchange_precision: how matrices travel, as the optimizer's hyperparameter, which by default is `"bf16"` where
            polar factors are computed in it.
        momentum: dtype of the momenta, in which `"fp32"` has them travel.
        clips: some norm is asked for, of each corrected gradient or of all gradients.
    """
    how = how or PolarMethod()
    matrices = [t for t in tensors if t.view is not None]
    cuts = tuple(Cut(tuple(_rows(t.shape, i, num_shards) for i in range(num_shards))) for t in matrices)
    jobs = tuple(
        Part(i, box, polar_work(*matrix_shape(box, t.view), how))
        for i, t in enumerate(matrices)
        if t.view is not None
        for box in parts(t.shape, t.view)
    )
    rounds = make_plan(jobs, cuts, num_replicas, rank) if matrices else ()
    spreads = num_shards * num_replicas > 1
    held = sum(_size(_rows(t.shape, rank[1], num_shards)) for t in tensors)
    of_matrices = sum(_size(cut.boxes[rank[1]]) for cut in cuts)
    shares = num_shards > 1
    there, back = wires(exchange_precision, momentum)
    ways = [(wire, way) for r in rounds for wire, way in ((there, r.outgoing), (back, r.incoming)) if shares]
    told = [[back.length(sizes_of(pieces)) for pieces in r.results] for r in rounds if num_replicas > 1]
    return StepCost(
        multiply_adds=sum(part.work for r in rounds for part in r.mine),
        all_to_all_bytes=sum(wire.length(sizes_of(p)) * wire.item_bytes for wire, way in ways for p in way),
        all_to_alls=len(ways),
        **_gathering(told, back.item_bytes),
        all_reduce_bytes=len(tensors) * 3 * 8 if spreads and shares and clips else 0,
        all_reduces=int(spreads and shares and clips),
        state_bytes=12 * held - 4 * of_matrices,
    )


def replicated_step(
    tensors: Sequence[TensorSpec],
    *,
    num_ranks: int,
    rank: int = 0,
    how: PolarMethod | None = None,
    param_bytes: int = 4,
    clips: bool = True,
) -> StepCost:
    """Return what a step costs a rank that keeps a share of the state (`shard_state=True`).

    The parameters it tells the others are what any optimizer with sharded state tells them, here in one bucket.
    `clips`: there is a `max_grad_norm`.
    """
    how = how or PolarMethod()
    works = [
        0.0 if t.view is None else sum(polar_work(*matrix_shape(box, t.view), how) for box in parts(t.shape, t.view))
        for t in tensors
    ]
    matrices = [i for i, t in enumerate(tensors) if t.view is not None]
    others = [i for i, t in enumerate(tensors) if t.view is None]
    owners = [0] * len(tensors)
    for places, loads in ((matrices, works), (others, [float(t.numel) for t in tensors])):
        for place, owner in zip(places, assign([loads[i] for i in places], num_ranks), strict=True):
            owners[place] = owner
    mine = [i for i, owner in enumerate(owners) if owner == rank]
    sizes = [sum(t.numel for t, owner in zip(tensors, owners, strict=True) if owner == r) for r in range(num_ranks)]
    return StepCost(
        multiply_adds=sum(works[i] for i in mine),
        **_gathering([sizes], param_bytes),
        all_reduce_bytes=8 if clips else 0,
        all_reduces=int(clips),
        state_bytes=sum((8 if tensors[i].view is not None else 12) * tensors[i].numel for i in mine),
    )


def _gathering(rounds: Sequence[Sequence[int]], item_bytes: int) -> dict[str, int]:
    """What it takes to tell all ranks what each has: the items of each rank, for each round."""
    padded = [sizes for sizes in rounds if any(sizes) and pads(sizes)]
    single = [sizes for sizes in rounds if any(sizes) and not pads(sizes)]
    return {
        "all_gathers": len(padded),
        "all_gather_bytes": sum(max(sizes) for sizes in padded) * item_bytes,
        "broadcasts": sum(size > 0 for sizes in single for size in sizes),
        "broadcast_bytes": sum(sum(sizes) for sizes in single) * item_bytes,
    }


def _rows(shape: tuple[int, ...], index: int, count: int) -> tuple[tuple[int, int], ...]:
    """What rank `index` of `count` holds of a tensor cut along its first dimension."""
    if count == 1 or not shape:
        return tuple((0, n) for n in shape)
    size = -(-shape[0] // count)
    start = min(index * size, shape[0])
    return ((start, min(start + size, shape[0])), *((0, n) for n in shape[1:]))


def _size(box: Sequence[tuple[int, int]]) -> int:
    return math.prod(stop - start for start, stop in box)
