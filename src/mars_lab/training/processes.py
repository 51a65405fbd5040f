"""Joining the processes that torchrun or `mars train --nproc` has started."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mars_lab.errors import InputError
from mars_lab.ranks import Ranks
from mars_lab.training.config import TrainConfig
from mars_lab.training.watchdog import record_collectives

DATA, SHARD, TENSOR = "data", "shard", "tensor"


@dataclass(frozen=True)
class Processes:
    """How this run's processes are arranged; without arguments one process that trains alone.

    The dimensions of `mesh` are those that `train.parallel` names: DATA (whole copies of the model), SHARD (one copy
    spread over processes), TENSOR (layers split).
    """

    ranks: Ranks = field(default_factory=Ranks)
    mesh: DeviceMesh | None = None

    def along(self, dimension: str) -> DeviceMesh | None:
        """The one-dimensional mesh of this process along `dimension`, if there is that dimension."""
        names = self.mesh.mesh_dim_names if self.mesh is not None else None
        return self.mesh[dimension] if self.mesh is not None and names and dimension in names else None

    @property
    def replicas(self) -> dist.ProcessGroup | None:
        """The processes with whole copies of the model, where nothing but the batch is divided."""
        data = self.along(DATA)
        return None if data is None or self.mesh is None or self.mesh.ndim > 1 else data.get_group()


def were_launched() -> bool:
    """Whether this process is one of several that a launcher has started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def speaks() -> bool:
    """Whether this process, alone or the first of several, is the one that talks to the person."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def joined(config: TrainConfig) -> Iterator[Processes]:
    """Meet the other processes, or train alone if no launcher started this one; leave them at the end.

    Raises:
        InputError: `config` doesn't fit the number of processes.
    """
    if not were_launched():
        yield Processes(Ranks(device=config.device))
        return
    size, local_rank = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    shape = mesh_shape(config, size, int(os.environ.get("LOCAL_WORLD_SIZE", size)))
    device = config.device
    if torch.device(device).type == "cuda":
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(local_rank)
    # Checkpoints and small objects travel over gloo on the CPU also where gradients have NCCL.
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    record_collectives()
    # The watchdog speaks first, and says more.
    dist.init_process_group(backend, timeout=timedelta(seconds=3 * config.timeout))
    try:
        yield _arranged(shape, device)
    finally:
        dist.destroy_process_group()


def _arranged(shape: dict[str, int], device: str) -> Processes:
    mesh = init_device_mesh(torch.device(device).type, tuple(shape.values()), mesh_dim_names=tuple(shape))
    num_splits = shape.get(TENSOR, 1)
    rank, size = dist.get_rank(), dist.get_world_size()
    return Processes(Ranks(rank, size, rank // num_splits, size // num_splits, device), mesh)


def mesh_shape(config: TrainConfig, size: int, local_size: int) -> dict[str, int]:
    """Names and sizes of the mesh's dimensions for `size` processes, `local_size` of them on each node.

    Raises:
        InputError: the processes can't be arranged so, or can't share the batch evenly.
    """
    group = config.group_size or local_size
    if config.parallel in ("hsdp", "tp") and size % group:
        raise InputError(
            f"train.group-size ({group}) must divide the number of processes ({size}) under --parallel "
            f"{config.parallel}"
        )
    shape = {
        "ddp": {DATA: size},
        "fsdp": {SHARD: size},
        "hsdp": {DATA: size // group, SHARD: group},
        "tp": {SHARD: size // group, TENSOR: group},
    }[config.parallel]
    num_shares = size // shape.get(TENSOR, 1)
    if config.batch_size % num_shares:
        fitting = max(1, round(config.batch_size / num_shares)) * num_shares
        raise InputError(
            f"train.batch-size ({config.batch_size}) counts the sequences of all processes together and must be a "
            f"multiple of the {num_shares} that share it; the nearest that fits is {fitting}"
        )
    return shape
