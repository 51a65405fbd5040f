"""Plain parameters that all ranks of a group hold, as under DistributedDataParallel: who does what of their step.

Without `shard_state` every rank takes every step, and matrices are shared out (`exchange`). With it a rank keeps the
state of its own parameters alone, takes their steps, and tells the others the result (ZeRO, stage 1).
"""
# torch.distributed is not typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from .assignment import assign
from .collectives import gathered
from .spread import Group, Spread, is_dtensor, spread_of

BUCKET_BYTES = 1 << 26  # of parameters that each rank tells at once


class Replicas:
    """The ranks of `group`; a group of one, or none, is this rank alone."""

    def __init__(self, group: Group, *, shard_state: bool) -> None:
        if shard_state and group is None:
            raise ValueError("shard_state=True needs process_group, the ranks that share the state; see DDP's")
        self.group = None if group is None or group.size() == 1 else group
        self.shards_state = shard_state and self.group is not None
        self._owners: dict[Tensor, int] = {}
        self._loads: dict[bool, list[float]] = {}

    def add(self, params: Sequence[Tensor], works: Sequence[float], *, are_matrices: bool) -> None:
        """Share out the state of more parameters; `works` says how long each one's step takes.

        Matrix updates and elementwise ones are balanced each among themselves.
        """
        if not self.shards_state or self.group is None:
            return
        size = self.group.size()
        plain = [(p, work) for p, work in zip(params, works, strict=True) if not is_dtensor(p)]
        loads = self._loads.setdefault(are_matrices, [0.0] * size)
        owners = assign([work for _, work in plain], size, loads=loads)
        self._owners.update(zip((p for p, _ in plain), owners, strict=True))

    def owns(self, param: Tensor) -> bool:
        """Whether this rank keeps the state of a parameter and takes its step."""
        return self.group is None or self._owners.get(param, self.group.rank()) == self.group.rank()

    def spread_of(self, param: Tensor) -> Spread | None:
        """Return how a parameter is spread, as its step sees it."""
        return spread_of(param, None if self.shards_state else self.group)

    def add_owners(self, value: Tensor) -> Tensor:
        """Return the sum over ranks of a 0-d tensor, where each knows the part of its own parameters."""
        if self.shards_state:
            value = value.clone()
            dist.all_reduce(value, group=self.group)
        return value

    def consolidated(self, entries: dict[int, Any], to: int) -> dict[int, Any] | None:
        """Return all ranks' entries, in host memory, on rank `to` of the group; None on the others."""
        if not self.shards_state or self.group is None:
            return entries if self.group is None or self.group.rank() == to else None
        on_host = {
            key: {name: t.cpu() if isinstance(t, Tensor) else t for name, t in state.items()}
            for key, state in entries.items()
        }
        parts: list[Any] | None = [None] * self.group.size() if self.group.rank() == to else None
        dist.gather_object(on_host, parts, group=self.group, group_dst=to)
        if parts is None:
            return None
        together = {key: state for part in parts for key, state in part.items()}
        return {key: together[key] for key in sorted(together)}

    def tell_(self, params: Sequence[Tensor]) -> None:
        """Give each of `params`, the same on all ranks, the value that its owner has."""
        if not self.shards_state or self.group is None:
            return
        by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for p in params:
            if p in self._owners:
                by_kind.setdefault((p.dtype, p.device), []).append(p)
        for kind in by_kind.values():
            for bucket in self._buckets(kind):
                self._tell_bucket_(bucket)

    def _buckets(self, params: Sequence[Tensor]) -> list[list[list[Tensor]]]:
        """Return buckets of at most `BUCKET_BYTES` an owner, or one parameter; each a list by owner."""
        assert self.group is not None
        buckets: list[list[list[Tensor]]] = []
        places = [(0, 0)] * self.group.size()  # of each owner: the bucket it fills, and how far
        for p in params:
            owner = self._owners[p]
            which, filled = places[owner]
            if filled and filled + p.nbytes > BUCKET_BYTES:
                which, filled = which + 1, 0
            places[owner] = which, filled + p.nbytes
            if len(buckets) == which:
                buckets.append([[] for _ in places])
            buckets[which][owner].append(p)
        return buckets

    def _tell_bucket_(self, by_owner: Sequence[Sequence[Tensor]]) -> None:
        assert self.group is not None
        mine, sizes = by_owner[self.group.rank()], [sum(p.numel() for p in params) for params in by_owner]
        example = next(p for params in by_owner for p in params)
        told = torch.cat([example.new_empty(0), *(p.detach().reshape(-1) for p in mine)])
        for params, values in zip(by_owner, gathered(told, sizes, self.group), strict=True):
            if params is not mine:
                for p, flat in zip(params, values.split([p.numel() for p in params]), strict=True):
                    p.detach().copy_(flat.view(p.shape))
