"""Parameter groups and state as they leave an optimizer for a checkpoint, and as they come back from one."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

from torch import Tensor

from . import schedules
from .hyperparameters import check
from .members import names_of
from .offload import place
from .sharding import Replicas, is_dtensor
from .state import check_shapes, portable, restore

_OWN = ("state_precision", "exchange_precision", "param_rounding", "donate_grads", "offload_state", "foreach", "fused")
_SCHEDULES = ("gamma", "polar_steps")


def to_plain(packed: dict[str, Any], groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return torch.optim's state dict of `groups` with schedules as plain dicts and pieces that any ranks can load."""
    plain = [group | {name: schedules.to_plain(group[name]) for name in _SCHEDULES} for group in packed["param_groups"]]
    state = packed["state"]
    if any(is_dtensor(p) for group in groups for p in group["params"]):
        state = {key: portable(entries) for key, entries in state.items()}
    return {**packed, "state": state, "param_groups": plain}


def check_loaded(groups: Sequence[dict[str, Any]], state: MutableMapping[Tensor, Any]) -> None:
    """Raise ValueError where loaded state has not the shape of its parameter."""
    for group in groups:
        for name, p in zip(names_of(group), group["params"], strict=True):
            check_shapes(name, p, state.get(p, {}))


def take_over(group: dict[str, Any], old: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Make a loaded group this optimizer's.

    Args:
        group: as loaded; hyperparameters that it lacks get the constructor's values.
        old: the group in whose place it comes; how this optimizer stores and computes is its own affair.
        defaults: the constructor's values.
    """
    for name, value in defaults.items():
        if name != "lr_1d":
            group.setdefault(name, value)
    group.setdefault("lr_1d_ratio", old.get("lr_1d_ratio", 1.0))
    for name in _SCHEDULES:
        group[name] = schedules.from_plain(group[name], old.get(name))
    group.update({name: old[name] for name in _OWN if name in old})
    check(group)


def restore_states(group: dict[str, Any], states: MutableMapping[Tensor, dict[str, Any]], replicas: Replicas) -> None:
    """Put the loaded state of a group's parameters where and how this optimizer keeps it."""
    for p in group["params"]:
        if not replicas.owns(p):
            states.pop(p, None)
        if p in states:
            states[p] = restore(
                states[p],
                p,
                capturable=group["capturable"],
                state_precision=group["state_precision"],
                rounding=group["param_rounding"],
            )
            place(states[p], p, on_host=group["offload_state"])
