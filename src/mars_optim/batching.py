"""From members of a step to batches of tensors that take the same step."""
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .batch import Batch, LossScaling, Treatment
from .members import Member
from .ownership import keep
from .polar import update_scale
from .preconditioners import PRECONDITIONERS
from .scalars import add_, read
from .state import is_q8, real, salt

# A member, its step count, its previous gradient, the coefficient of that, and its next previous gradient if kept.
_Place = tuple[Member, float | Tensor, Tensor | None, Tensor | None, Tensor | None]


def make_batches(
    members: Sequence[Member], group: dict[str, Any], norms: dict[int, float], scaling: LossScaling | None = None
) -> list[Batch]:
    """Advance the step counts of a group's members and sort their tensors into batches.

    `norms` holds the length of each parameter's previous gradient, by index, where the last step has found it.
    Tensors whose step is their first have batches of their own, without previous gradients. Under `capturable` the
    host does not know which they are; then the flags go along as tensors.
    """
    if not members:
        return []
    steps, has_prevs = _advance(members, group, scaling), _have_previous(members, group)
    by_kind: dict[tuple[Any, ...], list[_Place]] = {}
    for member, step, has_prev in zip(members, steps, has_prevs, strict=True):
        p, grad, state = member.param, member.grad, member.state
        prev = coefficient = kept = None
        if has_prev is not False:
            prev, coefficient = _previous_gradient(member, group, has_prev)
        if scaling is None and "prev_grad" in state:
            kept = _take(member, group)
        formats = (p.device, p.dtype, grad.dtype, None if prev is None else prev.dtype)
        kind = (has_prev, id(member.treatment), *formats, kept is None, coefficient is None, member.spread)
        by_kind.setdefault(kind, []).append((member, step, prev, coefficient, kept))
    return [_batch(places, group, kind[0], norms, scaling) for kind, places in by_kind.items()]


def _advance(members: Sequence[Member], group: dict[str, Any], scaling: LossScaling | None) -> Sequence[float | Tensor]:
    """Count this step; return the counts as numbers, or as tensors where the host must not know them."""
    counts: list[Tensor] = [member.state["step"] for member in members]
    if not group["capturable"] and not group["differentiable"]:
        return add_(counts, 1.0)
    if scaling is None:
        torch._foreach_add_(counts, 1.0)
    else:
        torch._foreach_add_(counts, 1.0 - scaling.found_inf.reshape(()))
    return counts if group["capturable"] else read(counts)


def _have_previous(members: Sequence[Member], group: dict[str, Any]) -> list[bool | None]:
    """Whether each one's gradient difference exists; None where only the device knows."""
    corrected = [member for member in members if member.treatment.gamma is not None]
    if group["first_step"] == "zero" or group["capturable"]:
        known = True if group["first_step"] == "zero" else None
        return [False if member.treatment.gamma is None else known for member in members]
    flags = iter(read([member.state["has_prev"] for member in corrected]))
    return [member.treatment.gamma is not None and bool(next(flags)) for member in members]


def _batch(
    places: Sequence[_Place],
    group: dict[str, Any],
    has_prev: bool | None,
    norms: dict[int, float],
    scaling: LossScaling | None,
) -> Batch:
    """Return the batch of places of one kind, and leave in the states what the next step needs of it."""
    members, steps, prev_grads, coefficients, kept = (list(column) for column in zip(*places, strict=True))
    first: Member = members[0]
    treatment = first.treatment
    states: list[dict[str, Any]] = [member.state for member in members]
    view = _itself if first.spread is None and not first.param.is_complex() else real
    batch = Batch(
        treatment=treatment,
        params=[view(member.param) for member in members],
        grads=[view(member.grad) for member in members],
        prev_grads=None if prev_grads[0] is None else [view(prev) for prev in prev_grads],
        next_grads=None,
        steps=steps,
        state={name: [view(s[name]) for s in states] for name in _updated_names(states[0], treatment)},
        update_scales=[_update_scale(member.param, treatment) for member in members],
        owners=states,
        sign=-1.0 if group["maximize"] else 1.0,
        first_steps=has_prev is False,
        has_prev=list(torch.stack([s["has_prev"] for s in states]).unbind()) if has_prev is None else None,
        prev_coefficients=None if coefficients[0] is None else coefficients,
        scaling=scaling,
        norms=norms,
        indices=[member.index for member in members],
        spread=first.spread,
        shapes=None if first.spread is None else [tuple(member.param.shape) for member in members],
    )
    # Whoever replaces the previous gradient says how long the new one is, or nobody knows.
    known = [norms.pop(member.index, math.inf) for member in members]
    batch.prev_norms = known if group["is_approx"] else None
    if "prev_grad" in states[0] and kept[0] is None:
        batch.next_grads = [view(s["prev_grad"]) for s in states]
    elif "prev_grad" in states[0]:
        for state, grad in zip(states, kept, strict=True):
            state["prev_grad"] = grad
    if "has_prev" in states[0] and (not has_prev or group["first_step"] == "zero"):
        flags = [s["has_prev"] for s in states]
        if scaling is None:
            torch._foreach_clamp_min_(flags, 1.0)
        else:
            taken = (1 - scaling.found_inf.reshape(())).to(flags[0])
            torch._foreach_maximum_(flags, [taken] * len(flags))
    if _takes_random_numbers(first.param, states[0], treatment):
        shard = 0 if first.spread is None else first.spread.shard
        batch.salts = [salt(member.index, shard) for member in members]
    return batch


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _updated_names(state: dict[str, Any], treatment: Treatment) -> list[str]:
    """Names of the state tensors that backends read and update, with what belongs to them."""
    names = ["exp_avg_grad" if treatment.one_buffer else "exp_avg"]
    names += PRECONDITIONERS[treatment.preconditioner].state_names(treatment)
    names += [f"{name}_scale" for name in (*names, "prev_grad") if f"{name}_scale" in state]
    return [*names, "param_remainder"] if "param_remainder" in state else names


def _previous_gradient(
    member: Member, group: dict[str, Any], has_prev: bool | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return g'_t as stored and the factor it was clipped with, each None where there is none."""
    state = member.state
    if member.treatment.one_buffer:
        return None, None
    if group["is_approx"]:
        return state["prev_grad"], state.get("prev_coefficient")
    if member.prev_grad is None:
        # No gradient reached the tensor at x_{t-1} (an expert nobody asked): there it is truly zero.
        return torch.zeros_like(real(member.grad)), None
    prev = real(member.prev_grad)
    if has_prev is None or group["first_step"] == "zero":
        # On the first step what was evaluated does not count, be it nan: d_1 = 0, or g'_1 = 0.
        first = real(member.grad) if has_prev is None else torch.zeros_like(prev)
        prev = torch.where(state["has_prev"].to(prev.device).bool(), prev, first)
    return prev, member.prev_coefficient


def _take(member: Member, group: dict[str, Any]) -> Tensor | None:
    """Return the next step's previous gradient where it is a new tensor instead of a copy into the old one."""
    p, grad, donated = member.param, member.grad, group["donate_grads"]
    if group["differentiable"]:
        return grad.clone()  # the old one belongs to the graph
    if donated is False or group["offload_state"]:
        return None
    if member.state["prev_grad"].dtype != grad.dtype or grad.stride() != p.stride():
        return None
    if donated:
        p.grad = None
        return grad
    return keep(grad)


def _takes_random_numbers(p: Tensor, state: dict[str, Any], treatment: Treatment) -> bool:
    averages = [state[name] for name in ("exp_avg", "exp_avg_grad", "exp_avg_sq") if name in state]
    rounds_state = any(is_q8(t) or (t.dtype == torch.bfloat16) for t in averages)
    return rounds_state or (p.itemsize == 2 and treatment.rounds_params_stochastically)


def _update_scale(param: Tensor, treatment: Treatment) -> float:
    """The factor for elementwise preconditioners; matrix preconditioners scale each of their matrices."""
    if treatment.update_scale == "none" or param.ndim < 2 or param.numel() == 0:
        return 1.0
    if PRECONDITIONERS[treatment.preconditioner].matrix_only:
        return 1.0
    rows = param.shape[0]
    return update_scale(treatment.update_scale, rows, param.numel() // rows, transposed=treatment.matrix_transposed)
