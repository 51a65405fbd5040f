"""Hyperparameters of a parameter group: checks, and what they mean for one tensor.

A group is a plain dict, as everywhere in torch.optim; it is read anew at every step, so schedulers and users may
change it at any time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor

from .batch import Scalar, Treatment
from .polar import UPDATE_SCALES, PolarMethod, check_view, plain_coefficients
from .preconditioners import PRECONDITIONERS
from .presets import preset
from .state import PRECISIONS, ROUNDINGS

Gamma = float | Tensor | Callable[[int], Scalar]
_LARGEST_ONE_BUFFER_GAMMA = 0.9


def treatments(group: dict[str, Any]) -> tuple[Treatment, Treatment]:
    """Return the treatments of (tensors with fewer than two dimensions, all others) in `group`.

    AdamW for 1-D tensors is the point gamma = 0, clip off of the same step. A matrix preconditioner has no meaning
    for a vector, so `optimize_1d=True` gives vectors MARS-AdamW there, as the authors' code does.
    """
    chosen = preset(group["mars_type"])
    lr = _as_scalar(group["lr"])
    preconditioner = group["preconditioner"] or chosen.preconditioner
    main = Treatment(
        preconditioner=preconditioner,
        update_scale=group["update_scale"] or chosen.update_scale,
        gamma=_gamma(group),
        one_buffer=_has_one_buffer(group, preconditioner),
        clip_norm=group["clip_norm"],
        max_grad_norm=group["max_grad_norm"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=lr,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=group["amsgrad"],
        polar=polar_method(group),
        matrix_view=group["matrix_view"],
        matrix_transposed=group["matrix_transposed"],
        param_rounding=group["param_rounding"],
        exchange_precision=group["exchange_precision"],
    )
    if group["optimize_1d"]:
        if PRECONDITIONERS[main.preconditioner].matrix_only:
            vector = replace(main, preconditioner="adamw", update_scale="none", one_buffer=False)
            return vector, main
        return main, main
    decay_1d = group["weight_decay_1d"]
    vector = replace(
        main,
        preconditioner="adamw",
        update_scale="none",
        gamma=None,
        one_buffer=False,
        clip_norm=None,
        beta1=group["betas_1d"][0],
        beta2=group["betas_1d"][1],
        lr=lr * group["lr_1d_ratio"],
        weight_decay=main.weight_decay if decay_1d is None else decay_1d,
    )
    return vector, main


def _gamma(group: dict[str, Any]) -> Scalar | None:
    """Gamma at this step; None for the number 0, which says that there is no correction (a schedule may pass 0)."""
    gamma: Gamma = group["gamma"]
    if not isinstance(gamma, Tensor) and callable(gamma):
        return _as_scalar(gamma(group["schedule_step"]))
    return None if isinstance(gamma, (int, float)) and gamma == 0 else _as_scalar(gamma)


def _has_one_buffer(group: dict[str, Any], preconditioner: str) -> bool:
    """Whether e_t suffices: unclipped approx MARS with constant gamma and no second moment of c~_t.

    m_t = (1-gamma) e_t + gamma g_t; nearer to gamma = 1 the first step, divided by 1-gamma, would lose digits.
    """
    gamma = group["gamma"]
    return (
        group["is_approx"]
        and group["clip_norm"] is None
        and isinstance(gamma, (int, float))
        and 0 < gamma <= _LARGEST_ONE_BUFFER_GAMMA
        and PRECONDITIONERS[preconditioner].needs_momentum_only
    )


def _as_scalar(value: Scalar) -> Scalar:
    return value.reshape(()) if isinstance(value, Tensor) else value


def polar_method(group: dict[str, Any]) -> PolarMethod:
    """Return how polar factors are computed in `group`; raises ValueError for values out of range."""
    steps: int | Callable[[int], int] | None = group["polar_steps"]
    return PolarMethod(
        group["polar_method"],
        group["polar_coefficients"],
        steps(group["schedule_step"]) if callable(steps) else steps,
        group["polar_dtype"],
        group["polar_rank"],
    )


def fold_lr_1d(group: dict[str, Any]) -> None:
    """Turn a given `lr_1d` into the ratio lr_1d/lr, which schedules of lr leave alone.

    Raises:
        ValueError: lr is 0, where no ratio exists.
    """
    lr_1d = group.pop("lr_1d", None)
    if lr_1d is None:
        group.setdefault("lr_1d_ratio", 1.0)
        return
    _check_rate("lr_1d", lr_1d)
    lr = float(group["lr"])
    if lr == 0:
        raise ValueError(
            f"lr_1d={lr_1d!r} is kept as the ratio lr_1d/lr, which does not exist for lr=0; construct with the peak "
            "lr and let a scheduler lower it, or give lr_1d_ratio in the parameter group"
        )
    group["lr_1d_ratio"] = float(lr_1d) / lr


def check(group: dict[str, Any]) -> None:
    """Check every hyperparameter of a group (or of the defaults) and put it into its plain form.

    Raises:
        ValueError: a value out of range; the message names it and the range.
        RuntimeError: switches that cannot be combined.
    """
    fold_lr_1d(group)
    _check_rate("lr", group["lr"])
    group["betas"] = _check_betas("betas", group["betas"])
    group["betas_1d"] = _check_betas("betas_1d", group["betas_1d"])
    _check_number("eps", group["eps"])
    _check_number("weight_decay", group["weight_decay"])
    if group["weight_decay_1d"] is not None:
        _check_number("weight_decay_1d", group["weight_decay_1d"])
    _check_number("lr_1d_ratio", group["lr_1d_ratio"])
    for name in ("clip_norm", "max_grad_norm"):
        if group[name] is not None:
            _check_number(name, group[name], positive=True)
    _check_gamma(group["gamma"])
    for name in (
        "amsgrad",
        "is_approx",
        "optimize_1d",
        "skip_nonfinite",
        "offload_state",
        "matrix_transposed",
        "maximize",
        "capturable",
    ):
        _check_switch(name, group[name], bool)
    _check_switch("differentiable", group["differentiable"], bool)
    for name in ("foreach", "fused", "donate_grads"):
        _check_switch(name, group[name], (bool, type(None)))
    for name in ("preconditioner", "update_scale"):
        _check_switch(name, group[name], (str, type(None)))
    if group["first_step"] not in ("paper", "zero"):
        raise ValueError(f"first_step must be 'paper' or 'zero'; got {group['first_step']!r}")
    preset(group["mars_type"])
    preconditioner = group["preconditioner"]
    if preconditioner is not None and preconditioner not in PRECONDITIONERS:
        known = ", ".join(PRECONDITIONERS)
        raise ValueError(f"preconditioner must be None or one of {known}; got {preconditioner!r}")
    scale = group["update_scale"]
    if scale is not None and scale not in UPDATE_SCALES:
        raise ValueError(f"update_scale must be None or one of {', '.join(UPDATE_SCALES)}; got {scale!r}")
    group["matrix_view"] = check_view(group["matrix_view"])
    group["polar_coefficients"] = plain_coefficients(group["polar_coefficients"])
    polar_method(group)
    _check_precision(group["state_precision"])
    exchanged = group["exchange_precision"]
    if exchanged is not None and exchanged not in PRECISIONS:
        raise ValueError(f"exchange_precision must be None or one of {', '.join(PRECISIONS)}; got {exchanged!r}")
    if group["offload_state"] and (group["capturable"] or group["differentiable"]):
        raise ValueError(
            "offload_state=True moves state outside of the step; use capturable=False and differentiable=False"
        )
    if group["param_rounding"] not in ROUNDINGS:
        raise ValueError(f"param_rounding must be one of {', '.join(ROUNDINGS)}; got {group['param_rounding']!r}")
    if group["fused"] and group["foreach"]:
        raise RuntimeError("fused=True and foreach=True name two backends; leave one of them None")
    if group["fused"] and group["differentiable"]:
        raise RuntimeError("fused=True cannot be differentiated through; use fused=None with differentiable=True")
    if group["foreach"] and group["differentiable"]:
        raise RuntimeError("foreach=True cannot be differentiated through; use foreach=None with differentiable=True")
    if group["differentiable"] and not group["is_approx"]:
        raise RuntimeError("exact mode cannot be differentiated through; use is_approx=True with differentiable=True")
    if group["skip_nonfinite"] and group["capturable"]:
        raise ValueError("skip_nonfinite=True decides on the host, which a CUDA graph cannot; use capturable=False")


def check_matrices(group: dict[str, Any], names: list[str]) -> None:
    """Check that a matrix preconditioner can take the parameters of its group.

    Raises:
        TypeError: a complex parameter.
        ValueError: a split that does not add up to the parameter's dimension.
    """
    if not PRECONDITIONERS[group["preconditioner"] or preset(group["mars_type"]).preconditioner].matrix_only:
        return
    for name, param in zip(names, group["params"], strict=True):
        if param.ndim >= 2 and param.is_complex():
            raise TypeError(
                f"parameter {name} of shape {tuple(param.shape)} is {param.dtype}, but mars_type="
                f"{group['mars_type']!r} orthogonalises real matrices only; put it in a group with mars_type='adamw'"
            )
        view = group["matrix_view"]
        if param.ndim >= 2 and not isinstance(view, str):
            length = math.prod(param.shape[1:]) if view[1] == 1 else param.shape[0]
            if sum(view[2]) != length:
                raise ValueError(
                    f"parameter {name} of shape {tuple(param.shape)}: matrix_view {view} adds up to {sum(view[2])}; "
                    f"give sizes that add up to {length}"
                )


def _check_switch(name: str, value: object, types: type | tuple[type, ...]) -> None:
    if not isinstance(value, types):
        names = [t.__name__ for t in (types if isinstance(types, tuple) else (types,))]
        raise ValueError(f"{name} must be of type {' or '.join(names)}; got {value!r}")


def _check_rate(name: str, value: object) -> None:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name}: a Tensor lr must be 1-element; got shape {tuple(value.shape)}")
        value = value.item()
    _check_number(name, value)


def _check_number(name: str, value: object, *, positive: bool = False) -> None:
    number = float(value) if isinstance(value, Real) and value is not True and value is not False else math.nan
    if not math.isfinite(number) or number < 0 or (positive and number == 0):
        raise ValueError(f"{name} must be a finite number {'> 0' if positive else '>= 0'}; got {value!r}")


def _check_betas(name: str, value: object) -> tuple[float, float]:
    pair = cast("list[object]", list(value)) if isinstance(value, (tuple, list)) else []  # pyright: ignore[reportUnknownArgumentType]
    if len(pair) != 2:
        raise ValueError(f"{name} must be a pair (beta1, beta2); got {value!r}")
    for i, beta in enumerate(pair):
        if not isinstance(beta, (int, float)) or not 0.0 <= beta < 1.0:
            raise ValueError(f"{name}[{i}] must be a number in [0, 1); got {beta!r}")
    return cast("tuple[float, float]", tuple(pair))


def _check_precision(setting: object) -> None:
    names = ("exp_avg", "exp_avg_sq", "prev_grad")
    given = cast("dict[object, object]", setting) if isinstance(setting, dict) else {"state_precision": setting}
    for name, precision in given.items():
        if isinstance(setting, dict) and name not in names:
            raise ValueError(f"state_precision may name {', '.join(names)}; got {name!r}")
        if precision not in PRECISIONS:
            raise ValueError(f"{name} must have precision {', '.join(PRECISIONS)}; got {precision!r}")


def _check_gamma(gamma: object) -> None:
    if isinstance(gamma, Tensor):
        if gamma.numel() != 1 or not torch.is_floating_point(gamma):
            raise ValueError(
                f"a tensor gamma must be one floating-point number; got {gamma.dtype} {tuple(gamma.shape)}"
            )
    elif isinstance(gamma, bool) or not (callable(gamma) or isinstance(gamma, (int, float))):
        raise ValueError(f"gamma must be a number, a 0-d tensor or a schedule (step -> number); got {gamma!r}")
    elif not callable(gamma) and not math.isfinite(gamma):
        raise ValueError(f"gamma must be finite; got {gamma!r}")
