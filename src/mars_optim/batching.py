"""From parameters with gradients to batches of tensors that take the same step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .batch import Batch, Treatment
from .polar import update_scale
from .preconditioners import PRECONDITIONERS
from .state import arithmetic_dtype


@dataclass(frozen=True)
class Member:
    """A parameter that takes part in this step."""

    name: str
    param: Tensor
    state: dict[str, Any]
    treatment: Treatment
    prev_grad: Tensor | None = None  # exact mode: g'_t

    @property
    def is_corrected(self) -> bool:
        return self.treatment.gamma is not None


def make_batches(members: Sequence[Member], group: dict[str, Any]) -> list[Batch]:
    """Advance the step counts of a group's members and sort their tensors into batches.

    Tensors whose step is their first have batches of their own, without previous gradients. Under `capturable` the
    host does not know which they are; then the flags go along as tensors.
    """
    batches: dict[tuple[Any, ...], Batch] = {}
    for member in members:
        p, state, treatment = member.param, member.state, member.treatment
        has_prev = _has_previous(member, group)
        dtype = arithmetic_dtype(p)
        batch = batches.setdefault(
            (id(treatment), p.device, p.dtype, has_prev),
            Batch(
                treatment=treatment,
                params=[],
                grads=[],
                prev_grads=None if has_prev is False else [],
                next_grads=[] if member.is_corrected and group["is_approx"] else None,
                steps=[],
                state={},
                update_scales=[],
                has_prev=[] if has_prev is None else None,
            ),
        )
        batch.params.append(_real(p))
        batch.grads.append(_gradient(p.grad, dtype, maximize=group["maximize"]))
        for name in ("exp_avg", *PRECONDITIONERS[treatment.preconditioner].state_names(treatment)):
            batch.state.setdefault(name, []).append(_real(state[name]))
        if batch.prev_grads is not None:
            if group["is_approx"]:
                prev = _real(state["prev_grad"])
            elif member.prev_grad is None:
                # No gradient reached the tensor at x_{t-1} (an expert nobody asked): there it is truly zero.
                prev = torch.zeros_like(batch.grads[-1])
            else:
                prev = _gradient(member.prev_grad, dtype, maximize=group["maximize"])
                if group["first_step"] == "zero":  # g'_1 = 0, whatever was evaluated
                    prev = prev * state["has_prev"].to(prev.dtype)
            batch.prev_grads.append(prev)
        if batch.next_grads is not None:
            batch.next_grads.append(_real(state["prev_grad"]))
        if batch.has_prev is not None:
            batch.has_prev.append(state["has_prev"].clone())
        if member.is_corrected:
            state["has_prev"].fill_(1)
        state["step"].add_(1)
        batch.steps.append(state["step"] if group["capturable"] else state["step"].item())
        batch.update_scales.append(_update_scale(p, treatment))
    return list(batches.values())


def _has_previous(member: Member, group: dict[str, Any]) -> bool | None:
    """Whether a gradient difference exists; None where only the device knows."""
    if not member.is_corrected:
        return False
    if group["first_step"] == "zero":
        return True
    if group["capturable"]:
        return None
    return bool(member.state["has_prev"].item())


def _gradient(grad: Tensor | None, dtype: torch.dtype, *, maximize: bool) -> Tensor:
    assert grad is not None
    real = _real(grad.to(dtype))
    return -real if maximize else real


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _update_scale(param: Tensor, treatment: Treatment) -> float:
    """The factor for elementwise preconditioners; matrix preconditioners scale each of their matrices."""
    if param.ndim < 2 or param.numel() == 0 or PRECONDITIONERS[treatment.preconditioner].matrix_only:
        return 1.0
    rows = param.shape[0]
    return update_scale(treatment.update_scale, rows, param.numel() // rows, transposed=treatment.matrix_transposed)
