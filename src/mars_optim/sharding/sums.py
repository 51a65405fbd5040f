"""Sums over shards: one collective for all tensors of a mesh."""
# torch.distributed is not typed.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from .spread import Group, Spread, group_over


def add_shards(
    sums: Sequence[Tensor], spreads: Sequence[Spread | None], indices: Sequence[Sequence[int]], num_params: int
) -> list[Tensor]:
    """Return sums over whole tensors from sums over this rank's pieces.

    One all-reduce for each mesh, of a table with a row for each parameter of the optimizer: ranks that have sorted
    their tensors differently cannot mix them up. Where a mesh cuts some tensors over a dimension that others are
    replicated over, the first of the replicas contributes alone.

    Args:
        sums: for each batch a row for each of its tensors, shape (n, k), float64.
        spreads: how the tensors of each batch are spread; None: they are not.
        indices: of each batch's tensors among all parameters.
        num_params: how many parameters there are.
    """
    results = list(sums)
    by_mesh: dict[object, list[tuple[int, Spread]]] = {}
    for i, spread in enumerate(spreads):
        if spread is not None and spread.mesh is not None:
            by_mesh.setdefault(spread.mesh, []).append((i, spread))
    for mesh, places in by_mesh.items():
        cut = sorted({dim for _, spread in places for dim in spread.shard_dims if spread.mesh.size(dim) > 1})
        if not cut:
            continue
        first = sums[places[0][0]]
        table = torch.zeros(num_params, first.shape[1], dtype=torch.float64, device=first.device)
        for i, spread in places:
            coordinate = spread.mesh.get_coordinate()
            if all(dim in spread.shard_dims or coordinate[dim] == 0 for dim in cut):
                table[list(indices[i])] = sums[i].to(table)
        dist.all_reduce(table, group=group_over(mesh, cut))
        for i, _ in places:
            results[i] = table[list(indices[i])].to(sums[i].device)
    return results


def any_rank(flag: bool, groups: Sequence[Group], device: torch.device) -> bool:
    """Return whether `flag` is true on any rank of the groups; waits for the device."""
    if not groups:
        return flag
    count = torch.tensor(float(flag), device=device)
    for group in groups:
        dist.all_reduce(count, group=group)
    return bool(count > 0)
