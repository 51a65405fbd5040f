"""How a tensor is spread over ranks: DTensors of `fully_shard` and tensor parallelism, plain tensors of DDP.

Two groups of ranks matter. The *shard group* holds the pieces of one tensor, each a box of it; the *replica group*
holds the same piece. Under FSDP2 and tensor parallelism there are shards only, under DDP replicas only, under HSDP
both.
"""
# DTensor's parts are not typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateUsage=false, reportAttributeAccessIssue=false

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

Box = tuple[tuple[int, int], ...]  # (start, stop) in each dimension
Group = Any  # torch.distributed.ProcessGroup, which a torch without distributed lacks


@dataclass(frozen=True, eq=False)
class Cut:
    """The boxes that the ranks of a shard group hold of a tensor, in the group's order. Compared by identity."""

    boxes: tuple[Box, ...]


@dataclass(frozen=True, eq=False)
class Spread:
    """Which ranks hold what of a tensor; a group is None where it would be this rank alone.

    Compared by identity: `spread_of` returns the same object for the same mesh and placements.
    """

    shard_group: Group = None
    replica_group: Group = None
    mesh: Any = None
    placements: tuple[Any, ...] = ()
    coordinates: tuple[tuple[int, ...], ...] = ()  # in the mesh, of each rank of the shard group

    @property
    def shard(self) -> int:
        """Place of this rank in the shard group."""
        return 0 if self.shard_group is None else self.shard_group.rank()

    @property
    def num_shards(self) -> int:
        """Size of the shard group."""
        return 1 if self.shard_group is None else self.shard_group.size()

    @property
    def replica(self) -> int:
        """Place of this rank in the replica group."""
        return 0 if self.replica_group is None else self.replica_group.rank()

    @property
    def num_replicas(self) -> int:
        """Size of the replica group."""
        return 1 if self.replica_group is None else self.replica_group.size()

    @property
    def shard_dims(self) -> tuple[int, ...]:
        """Dimensions of the mesh over which the tensor is cut."""
        return tuple(i for i, placement in enumerate(self.placements) if not placement.is_replicate())

    def cut(self, shape: Sequence[int]) -> Cut:
        """Return the piece of a tensor of `shape` that each rank of the shard group holds."""
        return _cut(self, tuple(shape))


def is_dtensor(tensor: Tensor) -> bool:
    """Whether `tensor` is a DTensor; does not import what defines them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def has_dtensor(tensors: Iterable[Tensor]) -> bool:
    """Whether any of `tensors` is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(issubclass(kind, module.DTensor) for kind in set(map(type, tensors)))


def local(tensor: Tensor) -> Tensor:
    """Return what of `tensor` lies on this rank: the tensor itself unless it is a DTensor."""
    if not is_dtensor(tensor):
        return tensor
    piece: Any = tensor._local_tensor
    return piece.wait() if hasattr(piece, "wait") else piece  # an unfinished collective


def like(piece: Tensor, whole: Tensor) -> Tensor:
    """Return `piece` as this rank's part of a DTensor spread as `whole` is; itself where that is no DTensor.

    `piece` may have trailing dimensions that `whole` lacks.
    """
    if not is_dtensor(whole):
        return piece
    shape = torch.Size((*whole.shape, *piece.shape[whole.ndim :]))
    stride = torch.empty(shape, device="meta").stride()
    return _dtensor().from_local(
        piece, whole.device_mesh, whole.placements, run_check=False, shape=shape, stride=stride
    )


def piece_of(values: Tensor, whole: Tensor) -> Tensor:
    """Return this rank's piece of `values`, a plain tensor of the whole shape, as a DTensor spread as `whole` is."""
    spread = spread_of(whole)
    assert spread is not None
    box = spread.cut(whole.shape).boxes[spread.shard]
    return like(values[tuple(slice(*bounds) for bounds in box)].contiguous(), whole)


def placed_like(grad: Tensor, param: Tensor) -> Tensor:
    """Return a gradient spread as its parameter is; partial sums of tensor parallelism are added up."""
    if not is_dtensor(grad) or grad.placements == param.placements:
        return grad
    return grad.redistribute(param.device_mesh, param.placements)


def spread_of(param: Tensor, process_group: Group = None) -> Spread | None:
    """Return how a parameter is spread; None: it is not.

    Args:
        param: a DTensor, or a plain tensor that all ranks of `process_group` hold.
        process_group: of the plain ones.
    """
    if is_dtensor(param):
        return _spread(param.device_mesh, tuple(param.placements))
    return None if process_group is None or process_group.size() == 1 else _replicated(process_group)


def groups_of(params: Iterable[Tensor], process_group: Group = None) -> list[Group]:
    """Return the groups that hold pieces or copies of any of the parameters, each once."""
    spreads = [spread_of(p, process_group) for p in params]
    groups = [group for s in spreads if s is not None for group in (s.shard_group, s.replica_group)]
    return list(dict.fromkeys(group for group in groups if group is not None))


def refusal(param: Tensor) -> str | None:
    """Return why the step cannot be right for a distributed parameter, and what to use; None where it can."""
    if getattr(param, "_fsdp_flattened", False) or getattr(param, "_is_flat_param", False):
        return (
            "is a flat parameter of FullyShardedDataParallel, whose pieces have lost the shapes that clipping and "
            "matrix updates need; use torch.distributed.fsdp.fully_shard"
        )
    if not is_dtensor(param):
        return None
    mesh, placements = param.device_mesh, param.placements
    if mesh.get_coordinate() is None:
        return f"lies on {mesh}, of which this rank is no part; give each rank's optimizer the parameters it holds"
    if any(placement.is_partial() for placement in placements):
        return f"has placements {placements}, a sum not yet added up; redistribute it to Shard or Replicate"
    return None


def _dtensor() -> Any:
    return sys.modules["torch.distributed.tensor"].DTensor


@cache
def _replicated(process_group: Group) -> Spread:
    return Spread(replica_group=process_group)


@cache
def _spread(mesh: Any, placements: tuple[Any, ...]) -> Spread:
    cut = [i for i in range(mesh.ndim) if mesh.size(i) > 1 and not placements[i].is_replicate()]
    same = [i for i in range(mesh.ndim) if mesh.size(i) > 1 and placements[i].is_replicate()]
    shard_group, replica_group = group_over(mesh, cut), group_over(mesh, same)
    if shard_group is None:
        coordinates = (tuple(mesh.get_coordinate() or ()),)
    else:
        ranks = sys.modules["torch.distributed"].get_process_group_ranks(shard_group)
        coordinates = tuple(tuple(int(i) for i in (mesh.mesh == rank).nonzero()[0]) for rank in ranks)
    return Spread(shard_group, replica_group, mesh, placements, coordinates)


def group_over(mesh: Any, dims: Sequence[int]) -> Group:
    """Return the group of ranks that differ from this one in `dims` of the mesh alone; None for no dimension."""
    if not dims:
        return None
    if len(dims) == 1:
        return mesh.get_group(dims[0])
    names = tuple(mesh.mesh_dim_names[i] for i in dims) if mesh.mesh_dim_names else ()
    if not names:
        raise ValueError(f"{mesh} has no names; give init_device_mesh mesh_dim_names, so that dimensions can be joined")
    joined = mesh if len(dims) == mesh.ndim else mesh[names]
    return joined._flatten("_".join(names)).get_group()


@cache
def _cut(spread: Spread, shape: tuple[int, ...]) -> Cut:
    if spread.shard_group is None:
        return Cut((tuple((0, n) for n in shape),))
    compute = sys.modules["torch.distributed.tensor._utils"]._compute_local_shape_and_global_offset
    boxes: list[Box] = []
    for coordinate in spread.coordinates:
        sizes, offsets = compute(shape, spread.mesh.shape, list(coordinate), spread.placements)
        boxes.append(tuple((start, start + size) for start, size in zip(offsets, sizes, strict=True)))
    return Cut(tuple(boxes))


def intersection(one: Box, other: Box) -> Box | None:
    """Return the box that two boxes share; None where that is empty."""
    shared = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return None if any(start >= stop for start, stop in shared) else shared


def within(box: Box, outer: Box) -> tuple[slice, ...]:
    """Return the index of `box` in a tensor that holds `outer`."""
    return tuple(slice(start - begin, stop - begin) for (start, stop), (begin, _) in zip(box, outer, strict=True))


def size_of(box: Box) -> int:
    """Return the number of elements in a box."""
    return math.prod(stop - start for start, stop in box)
