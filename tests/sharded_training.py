"""Trains one small model on several processes in every layout and compares it with one process: the equality table.

    python tests/sharded_training.py        # prints a row for each case, on 2 and on 4 processes

Each case is 20 steps in float64 (or as it says) on the same global batches. `difference` is the largest one between
any two weights of the model trained on many processes and on one.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

from mars_optim import MARS, param_groups

STEPS = 20
BATCH = 8


class Block(nn.Module):
    """Odd sizes, so that shards are uneven, and for some ranks empty."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)  # a key's bias has no gradient but rounding
        self.fc1 = nn.Linear(width, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, width)
        self.gate = nn.Parameter(torch.ones(1))
        self.experts = nn.Parameter(torch.randn(3, width, width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + torch.softmax(q @ k.mT, -1) @ v
        x = x + torch.einsum("btw,ewv->btv", x.tanh(), self.experts) / 3
        return x + self.gate * self.fc2(torch.relu(self.fc1(x)))


class Model(nn.Module):
    """Two blocks between an embedding and a head."""

    def __init__(self, width: int = 10, hidden: int = 14) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, width)
        self.blocks = nn.Sequential(Block(width, hidden), Block(width, hidden))
        self.head = nn.Linear(width, 13)
        next(self.blocks.parameters()).requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks(self.embedding(tokens))) * 1.0  # no view: FSDP warns of those


@dataclass(frozen=True)
class Case:
    """A layout, a type and the options that differ from the test's own."""

    layout: str
    mars_type: str
    world: int
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    dtype: str = "float64"
    tolerance: float = 1e-12

    @property
    def name(self) -> str:
        return " ".join(
            [f"{self.world} {self.layout} {self.mars_type}", *(f"{k}={v}" for k, v in self.options.items())]
        )


LAYOUTS = {
    2: ("ddp", "ddp + sharded state", "fsdp", "tp"),
    4: ("ddp", "ddp + sharded state", "fsdp", "hsdp 2x2", "fsdp 2 x tp 2"),
}


def _cases() -> list[Case]:
    cases: list[Case] = []
    for world, layouts in LAYOUTS.items():
        for layout in layouts:
            cases += [Case(layout, mars_type, world) for mars_type in ("adamw", "lion", "shampoo", "m")]
            if layout != "ddp + sharded state":
                cases += [Case(layout, t, world, {"is_approx": False}) for t in ("adamw", "m")]
    for layout in ("ddp", "fsdp", "fsdp 2 x tp 2"):
        cases.append(Case(layout, "m", 4, {"gather_matrices": True}))
        cases.append(Case(layout, "m", 4, {"clip_norm": None, "fused": False}))
    for layout in ("ddp + sharded state", "hsdp 2x2"):
        cases.append(Case(layout, "adamw", 4, {"skip_nonfinite": True}))
        cases.append(Case(layout, "adamw", 4, {"state_precision": "8bit"}, tolerance=0.1))
        # Momenta travel in bfloat16 there; singular values end within 0.03 of 1, and steps are 20 times 0.02.
        cases.append(Case(layout, "m", 4, {"polar_dtype": torch.bfloat16}, "float32", tolerance=0.02))
    return cases


CASES = _cases()


def _build(case: Case) -> Model:
    torch.manual_seed(3)
    return Model().to(getattr(torch, case.dtype))


def _optimizer(case: Case, model: nn.Module, **options: Any) -> MARS:
    settings: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "clip_norm": 0.05, "max_grad_norm": 0.5, "gamma": 0.1}
    groups = param_groups(model, mars_type=case.mars_type)
    return MARS(groups, mars_type=case.mars_type, **{**settings, **case.options, **options})


def _spread(case: Case, model: Model) -> tuple[nn.Module, dict[str, Any], int, int]:
    """Return the model in the layout of the case, options of its optimizer, and rank and number of the data ranks."""
    world, rank = dist.get_world_size(), dist.get_rank()
    if case.layout.startswith("ddp"):
        options = {"process_group": dist.group.WORLD, "shard_state": "sharded" in case.layout}
        return DistributedDataParallel(model), options, rank, world
    if case.layout == "tp":
        return _tensor_parallel(model, init_device_mesh("cpu", (world,))), {}, 0, 1
    data_rank, num_data_ranks = rank, world
    if case.layout == "hsdp 2x2":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    elif case.layout == "fsdp 2 x tp 2":
        both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        model, mesh = _tensor_parallel(model, both["tensor"]), both["data"]
        data_rank, num_data_ranks = mesh.get_local_rank(), 2
    else:
        mesh = init_device_mesh("cpu", (world,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, {}, data_rank, num_data_ranks


def _tensor_parallel(model: Model, mesh: Any) -> Model:
    for block in model.blocks:
        parallelize_module(block, mesh, {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()})
    return model


def train(case: Case, model: nn.Module, optimizer: MARS, rank: int = 0, num_ranks: int = 1, steps: int = STEPS) -> None:
    """Take the steps of a case with this data rank's share of each batch."""
    generator = torch.Generator().manual_seed(5)
    for step in range(steps):
        tokens = torch.randint(0, 13, (BATCH, 7), generator=generator)
        mine = tokens[rank * BATCH // num_ranks : (rank + 1) * BATCH // num_ranks]

        def closure(mine: Tensor = mine) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(mine[:, :-1]).flatten(0, 1), mine[:, 1:].flatten())
            loss.backward()
            return loss

        if not all(group["is_approx"] for group in optimizer.param_groups):
            optimizer.step(closure)
            continue
        closure()
        if step == 3 and optimizer.param_groups[0]["skip_nonfinite"]:
            _spoil(model, rank)
        optimizer.step()


def _spoil(model: nn.Module, rank: int) -> None:
    """Put a nan into the gradient that one rank holds of a sharded tensor, or all hold of a replicated one."""
    grad = next(p.grad for name, p in model.named_parameters() if name.endswith("head.weight"))
    assert grad is not None
    if not isinstance(grad, DTensor):
        grad[0, 0] = torch.nan
    elif rank == 0:
        grad.to_local()[0, 0] = torch.nan


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on each rank."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def _difference(case: Case) -> float:
    alone = _build(case)
    own = {name: value for name, value in case.options.items() if name != "gather_matrices"}
    train(case, alone, _optimizer(Case(case.layout, case.mars_type, 1, own), alone))
    spread, options, rank, num_ranks = _spread(case, _build(case))
    optimizer = _optimizer(case, spread, **options)
    train(case, spread, optimizer, rank, num_ranks)
    if case.options.get("skip_nonfinite"):
        assert optimizer.num_skipped_steps == 1
    largest = 0.0
    for expected, p in zip(alone.parameters(), spread.parameters(), strict=True):
        found = whole(p)
        largest = max(largest, float((found - expected.detach()).abs().max()))
        first = found.clone()
        dist.broadcast(first, 0)
        assert torch.equal(found, first), "ranks disagree"
    return largest


def _work(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/{world}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    results: dict[str, float | str] = {}
    for case in CASES:
        if case.world == world:
            if "-x" in sys.argv and rank == 0:
                print(case.name, flush=True)
            try:
                results[case.name] = _difference(case)
            except Exception:  # of one case; the others are still worth having
                results[case.name] = traceback.format_exc()
                if "-x" in sys.argv:
                    print(rank, traceback.format_exc(), flush=True)
                    os._exit(1)
        Path(folder, f"{world}-{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def run(world: int) -> dict[str, float | str]:
    """Return what each case of `world` processes came to: a difference, or the traceback of any rank."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_work, (world, folder), nprocs=world, start_method="spawn")
        results: dict[str, float | str] = {}
        for rank in range(world):
            for name, result in json.loads(Path(folder, f"{world}-{rank}.json").read_text()).items():
                if isinstance(result, str) or name not in results:
                    results[name] = result
    return results


if __name__ == "__main__":
    tolerances = {case.name: case.tolerance for case in CASES}
    failed = False
    print("| ranks, layout, type, options | difference | bound |\n| --- | --- | --- |")
    for world in (4,) if "-4" in sys.argv else LAYOUTS:
        for name, result in run(world).items():
            if isinstance(result, str):
                failed = True
                print(f"| {name} | {result.splitlines()[-1]} | |")
            else:
                failed |= not result <= tolerances[name]
                print(f"| {name} | {result:.1e} | {tolerances[name]:g} |")
    sys.exit(failed)
