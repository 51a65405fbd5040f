"""A small model with odd sizes, its layouts over processes, and its training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
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
        x = x.to(self.gate.dtype)
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
        return (
            self.head(self.blocks(self.embedding(tokens)).to(self.head.weight.dtype)) * 1.0
        )  # no view: FSDP warns of those


@dataclass(frozen=True)
class Case:
    """A layout, a type and the options that differ from the test's own."""

    layout: str
    mars_type: str
    world: int
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    dtype: str = "float64"
    tolerance: float = 1e-12
    check: str = "train"
    to: tuple[str, ...] = ()  # layouts to go on in, where the check is "move"

    @property
    def name(self) -> str:
        options = [f"{name}={value}" for name, value in self.options.items()]
        to = [] if not self.to else ["to", ", ".join(self.to)]
        dtype = [] if self.dtype == "float64" else [self.dtype]
        return " ".join([f"{self.world} {self.layout} {self.mars_type}", self.check, *dtype, *options, *to])


def build(case: Case) -> Model:
    torch.manual_seed(3)
    if case.dtype != "mixed":
        return Model().to(getattr(torch, case.dtype))
    model = Model().double()
    model.blocks[1].float()
    return model


def optimizer_of(case: Case, model: nn.Module, **options: Any) -> MARS:
    settings: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "clip_norm": 0.05, "max_grad_norm": 0.5, "gamma": 0.1}
    groups = param_groups(model, mars_type=case.mars_type)
    return MARS(groups, mars_type=case.mars_type, **{**settings, **case.options, **options})


def spread(case: Case, model: Model) -> tuple[nn.Module, dict[str, Any], int, int]:
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


def train(
    case: Case,
    model: nn.Module,
    optimizer: MARS,
    rank: int = 0,
    num_ranks: int = 1,
    start: int = 0,
    stop: int = STEPS,
) -> None:
    """Take the steps of a case with this data rank's share of each batch."""
    generator = torch.Generator().manual_seed(5)
    for step in range(stop):
        tokens = torch.randint(0, 13, (BATCH, 7), generator=generator)
        mine = tokens[rank * BATCH // num_ranks : (rank + 1) * BATCH // num_ranks]
        if step < start:
            continue

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
