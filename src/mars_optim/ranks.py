"""What a step must know of other ranks, and which parameter groups can be stepped on several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .hyperparameters import polar_method
from .polar import matrix_shape, parts, polar_work
from .preconditioners import PRECONDITIONERS
from .presets import preset
from .sharding import Replicas, is_dtensor, refusal


@dataclass(frozen=True)
class Ranks:
    """What all ranks know alike of a step."""

    replicas: Replicas
    num_params: int  # of the optimizer
    device: torch.device
    is_clipped: bool  # some group has a max_grad_norm
    gathers: bool  # whole matrices by gathering all on every rank


def join(group: dict[str, Any], names: list[str], replicas: Replicas) -> None:
    """Check that the parameters of a new group can be stepped on several ranks, and share out their state.

    Raises:
        ValueError: a parameter or setting that has no right step on several ranks; the message says what has.
    """
    are_spread = [is_dtensor(p) or replicas.group is not None for p in group["params"]]
    name = group["preconditioner"] or preset(group["mars_type"]).preconditioner
    preconditioner = PRECONDITIONERS[name]
    matrices: list[Tensor] = []
    for label, p, is_spread in zip(names, group["params"], are_spread, strict=True):
        why = refusal(p)
        if why:
            raise ValueError(f"parameter {label} of shape {tuple(p.shape)} {why}")
        if is_dtensor(p) and not preconditioner.is_elementwise and preconditioner.update_together_ is None:
            raise ValueError(
                f"parameter {label} is a DTensor, and preconditioner={name!r} is not known to be right for pieces of a "
                "tensor; register it with is_elementwise=True, or with update_together_"
            )
        if is_spread and p.ndim >= 2 and preconditioner.update_together_ is not None:
            parts(p.shape, group["matrix_view"])
            matrices.append(p)
    if any(are_spread):
        _check_settings(group, replicas, has_dtensors=any(is_dtensor(p) for p in group["params"]))
    works = [_work(p, group) for p in matrices]
    replicas.add(matrices, works, are_matrices=True)
    others = [p for p in group["params"] if not any(p is m for m in matrices)]
    replicas.add(others, [float(p.numel()) for p in others], are_matrices=False)


def _check_settings(group: dict[str, Any], replicas: Replicas, *, has_dtensors: bool) -> None:
    if has_dtensors and group["differentiable"]:
        raise ValueError("differentiable=True cannot record what ranks exchange; use it with plain tensors")
    if group["offload_state"]:
        raise ValueError(
            "offload_state=True does not go with parameters on several ranks; use fully_shard with CPUOffloadPolicy, "
            "which keeps parameters and state on the host"
        )
    if replicas.shards_state and not group["is_approx"]:
        raise ValueError(
            "exact mode needs the previous weights of every parameter on every rank, which shard_state=True would "
            "not save; use shard_state=False, or fully_shard, which shards them"
        )


def _work(p: Tensor, group: dict[str, Any]) -> float:
    view, how = group["matrix_view"], polar_method(group)
    return sum(polar_work(*matrix_shape(box, view), how) for box in parts(p.shape, view))
