"""A model spread over processes: DDP, FSDP2, HSDP, tensor parallelism."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from mars_lab.errors import InputError
from mars_lab.tasks.task import Task
from mars_lab.training.config import TrainConfig
from mars_lab.training.processes import DATA, SHARD, TENSOR, Processes


def spread(model: nn.Module, task: Task, config: TrainConfig, processes: Processes) -> None:
    """Shard and split the parameters of `model` in place, as `config.parallel` says; DDP leaves them whole.

    Raises:
        InputError: the model's sizes don't fit the number of processes.
    """
    tensor_mesh, shard_mesh = processes.along(TENSOR), processes.along(SHARD)
    if tensor_mesh is not None:
        task.split_layers(model, tensor_mesh)
    if shard_mesh is None:
        return
    if tensor_mesh is None and processes.mesh is not None:
        shard_mesh = processes.mesh  # with DATA before SHARD: HSDP
    elif shard_mesh.size() == 1:
        return  # layers are split over all processes, and nothing is left to shard
    num_shards = shard_mesh.size(-1)
    if tensor_mesh is not None:
        _check_sizes(model, num_shards)
        # True of logits that were a DTensor; no loss changes them in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    policy = MixedPrecisionPolicy()
    if config.precision in ("bf16", "fp16"):
        policy = MixedPrecisionPolicy(param_dtype=config.autocast_dtype, reduce_dtype=torch.float32)
    for part in (*task.layers(model), model):
        fully_shard(part, mesh=shard_mesh, mp_policy=policy, shard_placement_fn=_shard_dimension)


def _shard_dimension(parameter: nn.Parameter) -> Shard | None:
    """Where tensor parallelism has taken the rows, columns are sharded: no dimension is split twice."""
    if isinstance(parameter, DTensor) and parameter.placements[0] == Shard(0) and parameter.dim() > 1:
        return Shard(1)
    return None


def _check_sizes(model: nn.Module, num_shards: int) -> None:
    for name, parameter in model.named_parameters():
        if _shard_dimension(parameter) is not None and parameter.shape[1] % num_shards:
            raise InputError(
                f"{name} has {parameter.shape[1]} columns, which {num_shards} processes can't share evenly beside the "
                "split of its rows; choose another train.group-size, or a model.width that is a multiple of it"
            )


class Forward:
    """The module to compute losses with, and the moment at which gradients meet those of other processes."""

    def __init__(self, model: nn.Module, task: Task, config: TrainConfig, processes: Processes) -> None:
        is_sharded = isinstance(model, FSDPModule) or processes.along(TENSOR) is not None
        if config.compile:
            # A layer at a time where hooks around the layers gather parameters.
            for part in task.layers(model) if is_sharded else (model,):
                part.compile()
        self.module = model
        if processes.along(DATA) is not None and not is_sharded:
            self.module = DistributedDataParallel(model)

    @contextmanager
    def accumulating(self, *, is_last: bool) -> Iterator[None]:
        """Around forward and backward: gradients are exchanged in the last pass of a step only."""
        module = self.module
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(is_last)
        with nullcontext() if is_last or not isinstance(module, DistributedDataParallel) else module.no_sync():
            yield
