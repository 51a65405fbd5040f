"""Exact mode's evaluation at the previous weights: which weights, which randomness, which gradients."""
# torch.linalg is not typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .correction import clip_coefficient


@dataclass
class PreviousGradients:
    """What is kept between the evaluation at x_{t-1} and the step."""

    grads: dict[Tensor, Tensor] = field(default_factory=dict[Tensor, Tensor])
    overflowed: bool = False  # a grad scaler's scale was too large for them: the step has to be skipped


@contextmanager
def rewound(pairs: Sequence[tuple[Tensor, Tensor]]) -> Generator[None, None, None]:
    """Exchange the contents of each (parameter, previous parameter) pair inside the block, whatever happens in it.

    Contents, not storages: buckets, graphs and views elsewhere hold on to the parameters' memory.
    """
    _exchange(pairs)
    try:
        yield
    finally:
        _exchange(pairs)


@contextmanager
def replayed_randomness(devices: set[torch.device]) -> Generator[None, None, None]:
    """Put torch's generators back on leaving, so that what follows draws the same numbers as the block did."""
    accelerators = [device for device in devices if device.type not in ("cpu", "meta")]
    cpu_state = torch.get_rng_state()
    states = [(device, torch.get_device_module(device).get_rng_state(device)) for device in accelerators]
    try:
        yield
    finally:
        torch.set_rng_state(cpu_state)
        for device, state in states:
            torch.get_device_module(device).set_rng_state(state, device)


def clip_by_group_(grads: Sequence[tuple[Tensor, float]]) -> None:
    """Scale gradients, each given with its group's `max_grad_norm`, as `clip_grad_norm_` would."""
    if not grads:
        return
    norms = [torch.linalg.vector_norm(g, dtype=_norm_dtype(g)).to(grads[0][0].device) for g, _ in grads]
    total = torch.linalg.vector_norm(torch.stack(norms))
    for g, max_norm in grads:
        g.mul_(clip_coefficient(total, max_norm).to(g.device))


def _norm_dtype(grad: Tensor) -> torch.dtype | None:
    return torch.float32 if grad.dtype in (torch.float16, torch.bfloat16) else None


@torch.no_grad()
def _exchange(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    for param, prev_param in pairs:
        held = param.detach().clone()
        param.copy_(prev_param)
        prev_param.copy_(held)
