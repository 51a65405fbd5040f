"""Plain parameters that all ranks of a group hold, as under DistributedDataParallel: who does what of their step.

Without `shard_state` every rank takes every step, and matrices are shared out (`exchange`). With it a rank keeps the
state of its own parameters alone, takes their steps, and tells the others the result (ZeRO, stage 1).
"""
# torch.distributed is not typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from .collectives import all_gather
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
        loads = self._loads.setdefault(are_matrices, [0.0] * self.group.size())
        for i in sorted(range(len(params)), key=lambda i: (-works[i], i)):
            if not is_dtensor(params[i]):
                owner = min(range(len(loads)), key=lambda rank: (loads[rank], rank))
                loads[owner] += works[i]
                self._owners[params[i]] = owner

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
        padded = example.new_zeros(max(sizes))
        if mine:
            torch.cat([p.detach().reshape(-1) for p in mine], out=padded[: sizes[self.group.rank()]])
        gathered = padded.new_empty(len(sizes) * len(padded))
        all_gather(gathered, padded, group=self.group)
        for params, size, values in zip(by_owner, sizes, gathered.view(len(sizes), -1), strict=True):
            if params is not mine:
                for p, flat in zip(params, values[:size].split([p.numel() for p in params]), strict=True):
                    p.detach().copy_(flat.view(p.shape))
