"""Counts a step's collectives and compares them with the cost model's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from mars_optim.costs import TensorSpec, replicated_step, sharded_step
from sharded_training import Case, build, optimizer_of, spread, train


class Traffic(TorchDispatchMode):
    """Counts collectives, and the bytes that this rank hands to them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, tuple[int, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith(("c10d.", "_c10d_functional.")):
            given = args[0] if "allreduce" in name or "broadcast" in name else args[1:2]
            num_bytes = sum(t.nbytes for t in given if isinstance(t, Tensor))
            count, before = self.found.get(name.split(".")[1], (0, 0))
            self.found[name.split(".")[1]] = count + 1, before + num_bytes
        return func(*args, **(kwargs or {}))


def _is_matrix(p: Tensor, group: dict[str, Any]) -> bool:
    return p.ndim > 1 and (group["preconditioner"] or group["mars_type"]) in ("polar", "shampoo", "m")


def counted(case: Case) -> float:
    """0 where one step's collectives are those of the cost model, in number and in bytes."""
    model, options, rank, num_ranks = spread(case, build(case))
    optimizer = optimizer_of(case, model, **options)
    train(case, model, optimizer, rank, num_ranks, 0, 1)
    with Traffic() as traffic:
        optimizer.step()
    tensors = [
        TensorSpec(tuple(p.shape), g["matrix_view"] if _is_matrix(p, g) else None)
        for g in optimizer.param_groups
        for p in g["params"]
        if p.grad is not None
    ]
    if case.layout == "ddp + sharded state":
        cost = replicated_step(tensors, num_ranks=num_ranks, rank=rank, param_bytes=8)
    else:
        num_shards = {"ddp": 1, "hsdp 2x2": 2}.get(case.layout, case.world)
        place = divmod(dist.get_rank(), num_shards)
        cost = sharded_step(
            tensors,
            num_shards=num_shards,
            num_replicas=case.world // num_shards,
            rank=place,
            exchange_precision=case.options.get("exchange_precision", "fp32"),
            momentum=torch.float64,
        )
    expected = {
        "alltoall_base_": (cost.all_to_alls, cost.all_to_all_bytes),
        "_allgather_base_": (cost.all_gathers, cost.all_gather_bytes),
        "broadcast_": (cost.broadcasts, cost.broadcast_bytes),
        "allreduce_": (cost.all_reduces, cost.all_reduce_bytes),
    }
    expected = {name: pair for name, pair in expected.items() if pair[0]}
    assert traffic.found == expected, f"found {traffic.found}, expected {expected}"
    return 0.0
