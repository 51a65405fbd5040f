"""Which parameters take part in a step, with the state that they need for it."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from .batch import Treatment
from .exact import PreviousGradients
from .hyperparameters import fold_lr_1d, treatments
from .offload import place
from .preconditioners import PRECONDITIONERS
from .sharding import Replicas, Spread, any_rank, has_dtensor, local, placed_like
from .state import (
    arithmetic_dtype,
    choose_form,
    complete,
    complete_remainder,
    complete_scalar,
    discard,
    precision_of,
)


class Completed:
    """For each state, by its parameter's index: how many entries it had when it was last completed, and for what."""

    def __init__(self) -> None:
        self.states: dict[int, tuple[Any, ...]] = {}
        self.wants: dict[tuple[Any, ...], tuple[Any, ...]] = {}


@dataclass(slots=True)
class Member:
    """A parameter that takes part in this step."""

    param: Tensor
    grad: Tensor
    index: int  # among all parameters of the optimizer
    state: dict[str, Any]
    treatment: Treatment
    spread: Spread | None = None  # over ranks
    prev_grad: Tensor | None = None  # exact mode: g'_t, raw
    prev_coefficient: Tensor | None = None  # exact mode: the factor of its global clipping


def members_of(
    group: dict[str, Any],
    states: MutableMapping[Tensor, dict[str, Any]],
    previous: PreviousGradients | None,
    completed: Completed,
    first_index: int,
    replicas: Replicas,
    which: Iterable[int] | None = None,
) -> list[Member]:
    """Collect the parameters of `group` that take part in this step, and create what state they lack.

    Args:
        group: the group.
        states: the optimizer's state.
        previous: exact mode: what was evaluated at the previous weights.
        completed: what each state has been completed for; states that still are need no second look.
        first_index: the index of the group's first parameter among all.
        replicas: the ranks that hold the same plain parameters.
        which: places in the group to look at; None: all.

    Raises:
        RuntimeError: a sparse gradient.
        ValueError: exact mode without an evaluation at the previous weights.
    """
    fold_lr_1d(group)
    vector, main = treatments(group)
    # The same objects from step to step: then comparing what they are part of ends at their identity.
    wants_vector, wants_main = (completed.wants.setdefault(w, w) for w in (_wants(vector, group), _wants(main, group)))
    may_be_spread = replicas.group is not None or has_dtensor(group["params"])
    params: list[Tensor] = group["params"]
    members: list[Member] = []
    for i in range(len(params)) if which is None else which:
        p = params[i]
        grad, spread = p.grad, None
        if grad is None or not (replicas.group is None or replicas.owns(p)):
            continue
        if grad.is_sparse:
            raise RuntimeError(
                f"MARS does not support sparse gradients, and parameter {names_of(group)[i]} has one; construct the "
                "embedding with sparse=False"
            )
        if may_be_spread:
            grad, spread = placed_like(grad, p), replicas.spread_of(p)
        treatment, wants = (vector, wants_vector) if p.ndim < 2 else (main, wants_main)
        state, index = states[p], first_index + i
        if completed.states.get(index) != (len(state), grad.dtype, wants):
            only_materialises = not state and _is_materialising(p, grad, spread, group)
            _complete(state, p, treatment, group)
            completed.states[index] = (len(state), grad.dtype, wants)
            if only_materialises:
                continue
        member = Member(p, grad, index, state, treatment, spread)
        if previous is not None:
            member.prev_grad, member.prev_coefficient = previous.grads.get(p), previous.coefficients.get(p)
        elif treatment.gamma is not None and not group["is_approx"]:
            raise ValueError(
                "exact mode (is_approx=False) needs the gradient at the previous weights: call step(closure), or "
                "compute it inside `with optimizer.previous_params():` before the gradient of this step"
            )
        members.append(member)
    return members


def _wants(treatment: Treatment, group: dict[str, Any]) -> tuple[Any, ...]:
    """All that decides which entries a state has, and how they are stored."""
    precision = group["state_precision"]
    return (
        treatment.preconditioner,
        treatment.amsgrad,
        treatment.gamma is None,
        treatment.one_buffer,
        treatment.max_grad_norm is None,
        group["is_approx"],
        group["capturable"],
        group["param_rounding"],
        group["offload_state"],
        precision if isinstance(precision, str) else tuple(precision.items()),
        torch.get_default_dtype(),
    )


def _complete(state: dict[str, Any], p: Tensor, treatment: Treatment, group: dict[str, Any]) -> None:
    """Create what the state lacks, in the group's precision, and drop what the treatment has no use for."""
    is_corrected, is_approx, one_buffer = treatment.gamma is not None, group["is_approx"], treatment.one_buffer
    precision, capturable = group["state_precision"], group["capturable"]
    if state:
        gamma = treatment.gamma if one_buffer else 0.0
        choose_form(state, p, one_buffer=one_buffer, gamma=cast(float, gamma))
    # What another mode, or gamma = 0, has left behind would be out of date by the time it is used again.
    if not is_corrected or not is_approx or one_buffer:
        discard(state, "prev_grad")
    keeps = "exp_avg_grad" if one_buffer else "prev_grad" if is_approx else "prev_param"
    if not is_corrected or keeps not in state:
        state.pop("has_prev", None)
    complete_scalar(state, p, "step", capturable=capturable)
    complete(state, p, "exp_avg_grad" if one_buffer else "exp_avg", precision_of(precision, "exp_avg"))
    for name in PRECONDITIONERS[treatment.preconditioner].state_names(treatment):
        complete(state, p, name, precision_of(precision, name))
    if is_corrected:
        complete_scalar(state, p, "has_prev", capturable=capturable)
        if is_approx and not one_buffer:
            complete(state, p, "prev_grad", precision_of(precision, "prev_grad"))
            # Under `capturable` a grad scaler may leave unscaling to the step, at any step.
            if (treatment.max_grad_norm is not None or capturable) and "prev_coefficient" not in state:
                state["prev_coefficient"] = torch.ones((), dtype=arithmetic_dtype(p).to_real(), device=p.device)
    complete_remainder(state, p, group["param_rounding"])
    place(state, p, on_host=group["offload_state"])


def names_of(group: dict[str, Any]) -> list[str]:
    """Return what to call the parameters of `group` in messages."""
    return group.get("param_names") or [f"{i} of its group" for i in range(len(group["params"]))]


def _is_materialising(param: Tensor, grad: Tensor, spread: Spread | None, group: dict[str, Any]) -> bool:
    """Whether a checkpoint tool only wants the state to exist: a zero gradient and lr = 0 before any step."""
    if param.is_meta or float(group["lr"]) != 0:
        return False
    shards = [] if spread is None or spread.shard_group is None else [spread.shard_group]
    return not any_rank(bool(local(grad).any()), shards, grad.device)
