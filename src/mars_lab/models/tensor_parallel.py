"""GPT-2 with the matrices of its blocks split over processes (Shoeybi et al., "Megatron-LM", 2019).

The first matrix of attention and of the MLP is split by rows (output features), the second by columns, so that a
block communicates twice forward and twice backward. Everything else is held by every process. Each parameter is
stored as a DTensor whose rows or columns lie in their usual order, so that optimizer and checkpoints see nothing
special; activations stay plain tensors.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import Placement
from torch.nn import functional as F

from mars_lab.errors import InputError
from mars_lab.models.gpt2 import GPT2


def split(model: GPT2, mesh: DeviceMesh) -> None:
    """Split the blocks of `model` over the processes of the one-dimensional `mesh`.

    Raises:
        InputError: the heads can't be shared out evenly, or the model has dropout.
    """
    config = model.config
    if config.num_heads % mesh.size():
        raise InputError(
            f"model.num_heads ({config.num_heads}) must be a multiple of the {mesh.size()} processes that split a "
            "layer; set train.group-size to one of its divisors"
        )
    if config.dropout:
        raise InputError(
            f"model.dropout ({config.dropout}) must be 0 when layers are split: processes would drop the same entries "
            "of different heads; use another --parallel, or no dropout"
        )
    plan: dict[str, ParallelStyle] = {"transformer.wte": _Whole(), "transformer.wpe": _Whole(), "lm_head": _Whole()}
    plan["transformer.ln_f"] = _Whole()
    for i in range(config.num_layers):
        block = f"transformer.h.{i}"
        plan |= {f"{block}.ln_1": _Whole(), f"{block}.ln_2": _Whole()}
        plan |= {f"{block}.attn.c_attn": _WholeHeads(), f"{block}.attn.c_proj": RowwiseParallel()}
        plan |= {f"{block}.mlp.c_fc": ColwiseParallel(), f"{block}.mlp.c_proj": RowwiseParallel()}
    parallelize_module(model, mesh, plan)
    model.lm_head.weight = model.transformer.wte.weight


def _distribute(module: nn.Module, mesh: DeviceMesh, placement: Placement) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        # Every process has drawn the same weights, so nothing needs to be sent.
        shard = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(shard))


def _replicated(_: nn.Module, inputs: tuple[Tensor, ...], mesh: DeviceMesh) -> tuple[DTensor, ...]:
    return tuple(DTensor.from_local(x, mesh, [Replicate()]) for x in inputs)


class _Whole(ParallelStyle):
    """A module that every process holds whole and computes alike."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(
            module,
            device_mesh,
            lambda _, part, mesh: _distribute(part, mesh, Replicate()),
            _replicated,  # pyright: ignore[reportArgumentType] - the annotation forgets that it may return something
            lambda _, output, mesh: output.to_local(),
        )


class _WholeHeads(ParallelStyle):
    """The fused projection to Q, K and V: stored by rows, used by heads.

    Equal parts of the stacked rows of Q, K and V are no set of heads. Before each use the processes therefore
    exchange rows, so that each holds Q, K and V of its own heads: 3 D^2 / n elements each, less than the
    activations that the block exchanges anyway wherever a batch has more tokens than the model is wide.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, nn.Linear)
        _distribute(module, device_mesh, Shard(0))
        module.forward = partial(_project_whole_heads, module, device_mesh)
        return module


def _project_whole_heads(module: nn.Linear, mesh: DeviceMesh, input: Tensor) -> Tensor:
    weight = _rows_of_own_heads(module.weight, mesh)
    bias = None if module.bias is None else _rows_of_own_heads(module.bias, mesh)
    y: Tensor = F.linear(DTensor.from_local(input, mesh, [Replicate()]), weight, bias)
    assert isinstance(y, DTensor)
    return y.to_local()


def _rows_of_own_heads(stacked: Tensor, mesh: DeviceMesh) -> DTensor:
    """Q, K and V of this process's heads, from its part of the rows of all of them."""
    assert isinstance(stacked, DTensor)
    rows, num, me = stacked.to_local(), mesh.size(), mesh.get_local_rank()
    width = stacked.shape[0] // 3
    owner = torch.arange(stacked.shape[0]).remainder(width).div(width // num, rounding_mode="floor").chunk(num)
    order = owner[me].argsort(stable=True)
    send = [int((owner[me] == rank).sum()) for rank in range(num)]
    receive = [int((owner[rank] == me).sum()) for rank in range(num)]
    mine = all_to_all_single_autograd(rows[order.to(rows.device)], receive, send, mesh.get_group())
    return DTensor.from_local(mine, mesh, [Shard(0)])
