"""Exact mode's evaluation at the previous weights: which weights, which randomness, which gradients."""
# torch.linalg is not typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .correction import clip_coefficient
from .ownership import keep
from .sharding import Replicas, add_shards, any_rank, groups_of, local, placed_like, spread_of


@dataclass
class PreviousGradients:
    """What is kept between the evaluation at x_{t-1} and the step."""

    grads: dict[Tensor, Tensor] = field(default_factory=dict[Tensor, Tensor])
    coefficients: dict[Tensor, Tensor] = field(default_factory=dict[Tensor, Tensor])  # of their global clipping
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


@torch.no_grad()
def take_gradients(
    param_groups: Sequence[dict[str, Any]], grad_scaler: torch.amp.GradScaler | None, taken: PreviousGradients
) -> None:
    """Take the gradients out of `p.grad`, which DDP and others may write again; unscale them and find their clipping.

    Each evaluation is clipped by its own global norm, as `clip_grad_norm_` after each backward would.
    """
    clipped: list[tuple[Tensor, float]] = []
    for group in param_groups:
        for p in group["params"]:
            if p.grad is None or p.grad.is_sparse:
                continue
            grad = placed_like(p.grad, p)
            kept = None if group["donate_grads"] is False else keep(grad)
            taken.grads[p] = grad.detach().clone() if kept is None else kept
            if group["max_grad_norm"] is not None:
                clipped.append((p, group["max_grad_norm"]))
    if grad_scaler is not None and grad_scaler.is_enabled():
        scale = grad_scaler.get_scale()
        for grad in taken.grads.values():
            grad.div_(scale)
        finite = all_finite(local(grad) for grad in taken.grads.values())
        if any_rank(not finite, groups_of(taken.grads), next(iter(taken.grads)).device):
            taken.overflowed = True
            grad_scaler.update(scale * grad_scaler.get_backoff_factor())
    if clipped:
        total = _norm([taken.grads[p] for p, _ in clipped])
        by_norm = {max_norm: clip_coefficient(total, max_norm) for _, max_norm in clipped}
        taken.coefficients = {p: by_norm[max_norm] for p, max_norm in clipped}


@contextmanager
def evaluated_at_previous(
    param_groups: Sequence[dict[str, Any]],
    states: Mapping[Tensor, dict[str, Any]],
    grad_scaler: torch.amp.GradScaler | None,
) -> Generator[PreviousGradients, None, None]:
    """Inside the block parameters hold x_{t-1}; what it yields holds the gradients after a block that ends well."""
    params = [p for group in param_groups for p in group["params"]]
    pairs = [(p, states[p]["prev_param"]) for p in params if "prev_param" in states.get(p, {})]
    taken = PreviousGradients()
    with rewound(pairs), replayed_randomness({p.device for p in params}):
        yield taken
    take_gradients(param_groups, grad_scaler, taken)


def all_gradients_finite(
    param_groups: Sequence[dict[str, Any]], previous: PreviousGradients | None, replicas: Replicas
) -> bool:
    """Whether no gradient holds an inf or nan, on any rank; waits for the device."""
    params = [p for group in param_groups for p in group["params"]]
    grads = [p.grad for p in params if p.grad is not None and not p.grad.is_sparse]  # sparse: refused later, by name
    finite = all_finite(local(g) for g in (*grads, *(previous.grads.values() if previous else ())))
    return not any_rank(not finite, groups_of(params, replicas.group), params[0].device)


def _norm(grads: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients, wherever their pieces are."""
    squares = [torch.linalg.vector_norm(local(g), dtype=_norm_dtype(g)).double().square().view(1, 1) for g in grads]
    whole = add_shards(squares, [spread_of(g) for g in grads], [[i] for i in range(len(grads))], len(grads))
    return torch.cat([square.to(squares[0].device) for square in whole]).sum().sqrt().to(squares[0].dtype)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no tensor holds an inf or nan; waits for the device."""
    return all(bool(torch.isfinite(t).all()) for t in tensors)


def _norm_dtype(grad: Tensor) -> torch.dtype | None:
    return torch.float32 if grad.dtype in (torch.float16, torch.bfloat16) else None


@torch.no_grad()
def _exchange(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    for param, prev_param in pairs:
        current, previous = local(param), local(prev_param)
        held = current.detach().clone()
        current.copy_(previous)
        previous.copy_(held)
