"""Collectives of uneven sizes, and under the names that the installed torch prefers."""
# torch.distributed is not typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch import distributed as dist

from .spread import Group

_NAME = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"  # before torch 2.13
_all_gather: Any = getattr(dist, _NAME)
_PADDING = 1.5  # of what has to be moved; beyond it, one broadcast for each rank that has something


def pads(sizes: Sequence[int]) -> bool:
    """Whether ranks with so many elements each pad them to one length for an all-gather."""
    return len(sizes) * max(sizes) <= _PADDING * sum(sizes)


def gathered(mine: Tensor, sizes: Sequence[int], group: Group) -> list[Tensor]:
    """Return what each rank of `group` has: 1-D tensors of `sizes`, of which `mine` is this rank's."""
    if not any(sizes):
        return [mine[:0] for _ in sizes]
    if pads(sizes):
        padded = mine.new_zeros(max(sizes))
        padded[: len(mine)] = mine
        received = mine.new_empty(len(sizes) * len(padded))
        _all_gather(received, padded, group=group)
        return [part[:size] for part, size in zip(received.view(len(sizes), -1), sizes, strict=True)]
    parts = [mine if rank == group.rank() else mine.new_empty(size) for rank, size in enumerate(sizes)]
    handles = [
        dist.broadcast(part, group=group, group_src=rank, async_op=True) for rank, part in enumerate(parts) if len(part)
    ]
    for handle in handles:
        if handle is not None:
            handle.wait()
    return parts
