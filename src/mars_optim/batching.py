"""From parameters with gradients to batches of tensors that take the same step."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .batch import Batch, Treatment
from .exact import PreviousGradients
from .hyperparameters import fold_lr_1d, treatments
from .polar import update_scale
from .preconditioners import PRECONDITIONERS
from .state import arithmetic_dtype, complete


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


def members_of(
    group: dict[str, Any], states: MutableMapping[Tensor, dict[str, Any]], previous: PreviousGradients | None
) -> list[Member]:
    """Collect the parameters of `group` that take part in this step, and create what state they lack.

    Raises:
        RuntimeError: a sparse gradient.
        ValueError: exact mode without an evaluation at the previous weights.
    """
    fold_lr_1d(group)
    vector, main = treatments(group)
    members: list[Member] = []
    for name, p in zip(names_of(group), group["params"], strict=True):
        if p.grad is None:
            continue
        if p.grad.is_sparse:
            raise RuntimeError(
                f"MARS does not support sparse gradients, and parameter {name} has one; construct the embedding with "
                "sparse=False"
            )
        treatment = vector if p.ndim < 2 else main
        state = states[p]
        member = Member(name, p, state, treatment, None if previous is None else previous.grads.get(p))
        only_materialises = not state and _is_materialising(p, group)
        names = ["step", "exp_avg", *PRECONDITIONERS[treatment.preconditioner].state_names(treatment)]
        # What another mode, or gamma = 0, has left behind would be out of date by the time it is used again.
        if not member.is_corrected or not group["is_approx"]:
            state.pop("prev_grad", None)
        if not member.is_corrected or ("prev_grad" if group["is_approx"] else "prev_param") not in state:
            state.pop("has_prev", None)
        if member.is_corrected:
            names += ["has_prev", "prev_grad"] if group["is_approx"] else ["has_prev"]
        complete(state, p, names, capturable=group["capturable"])
        if only_materialises:
            continue
        if member.is_corrected and not group["is_approx"] and previous is None:
            raise ValueError(
                "exact mode (is_approx=False) needs the gradient at the previous weights: call step(closure), or "
                "compute it inside `with optimizer.previous_params():` before the gradient of this step"
            )
        members.append(member)
    return members


def names_of(group: dict[str, Any]) -> list[str]:
    """Return what to call the parameters of `group` in messages."""
    return group.get("param_names") or [f"{i} of its group" for i in range(len(group["params"]))]


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
                if has_prev is None or group["first_step"] == "zero":
                    # On the first step what was evaluated does not count, be it nan: d_1 = 0, or g'_1 = 0.
                    first = batch.grads[-1] if has_prev is None else torch.zeros_like(prev)
                    prev = torch.where(state["has_prev"].to(prev.device).bool(), prev, first)
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


def _is_materialising(param: Tensor, group: dict[str, Any]) -> bool:
    """Whether a checkpoint tool only wants the state to exist: a zero gradient and lr = 0 before any step."""
    if param.grad is None or param.is_meta:
        return False
    return float(group["lr"]) == 0 and not bool(param.grad.any())
