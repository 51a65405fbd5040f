"""The entries of a parameter's state: created, converted and loaded.

`step` and the flag `has_prev` are scalars, on the CPU where reading them makes nobody wait, unless the step is
capturable. Beside them stand

    exp_avg        m_t, or in the one-buffer form exp_avg_grad = e_t, the average of the gradients
    exp_avg_sq     v_t where the preconditioner has one; max_exp_avg_sq under amsgrad
    prev_grad      approx: the gradient of the previous step, raw; prev_coefficient is the factor s it was seen with
                   (missing: 1)
    prev_param     exact: the previous weights
    param_remainder  what a half-precision weight lacks

in full precision (fp32 under half-precision parameters, the gradient's own for `prev_grad`), bfloat16, or 8-bit
codes with their `..._scale`. State of a DTensor is a DTensor spread alike, but for the scales, which belong to this
rank's codes.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from mars_optim.sharding import is_dtensor, like, local, piece_of, spread_of

from . import formats
from .weights import decode_weight, remainder_dtype, remainder_of

_SCALARS = ("step", "has_prev")
_COEFFICIENT = "prev_coefficient"


def arithmetic_dtype(param: Tensor) -> torch.dtype:
    """Return the dtype in which a parameter's step is computed."""
    return torch.float32 if param.dtype in (torch.float16, torch.bfloat16) else param.dtype


def complete(state: dict[str, Any], param: Tensor, name: str, precision: str = "fp32") -> None:
    """Create the state tensor called `name` as zeros, or convert it to the precision asked for."""
    stored: Tensor | None = state.get(name)
    full = arithmetic_dtype(param)
    if name == "prev_grad":
        source = stored if param.grad is None else param.grad
        full = source.dtype if source is not None and not formats.is_q8(source) else full
    if stored is not None and stored.dtype == formats.stored_dtype(name, precision, full):
        return
    old_scale: Tensor | None = state.pop(f"{name}_scale", None)
    for entry, piece in formats.new(local(param), name, precision, full).items():
        state[entry] = like(piece, param) if entry == name else piece
    if stored is not None:
        values = formats.decode(real(stored), old_scale, arithmetic_dtype(param).to_real())
        formats.encode_(real(state[name]), state.get(f"{name}_scale"), values)


def real(tensor: Tensor) -> Tensor:
    """Return what lies on this rank of a tensor; complex numbers as (real, imaginary) pairs."""
    tensor = local(tensor)
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def complete_scalar(state: dict[str, Any], param: Tensor, name: str, *, capturable: bool) -> None:
    """Create the scalar called `name` as zero, on the parameter's device if `capturable`, else on the CPU."""
    device = param.device if capturable else torch.device("cpu")
    if name not in state:
        dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
        state[name] = torch.zeros((), dtype=dtype, device=device)
    elif state[name].device != device:  # `capturable` was switched; torch.compile does so by itself
        state[name] = state[name].to(device)


def complete_remainder(state: dict[str, Any], param: Tensor, rounding: str) -> None:
    """Create the remainder of a half-precision parameter, convert it, or drop it, as `rounding` asks."""
    dtype = remainder_dtype(param, rounding)
    old: Tensor | None = state.get("param_remainder")
    if dtype is None:
        state.pop("param_remainder", None)
    elif old is None:
        zeros = torch.zeros_like(local(param), dtype=dtype, memory_format=torch.preserve_format)
        state["param_remainder"] = like(zeros, param)
    elif old.dtype != dtype:
        piece = local(param.detach())
        state["param_remainder"] = like(remainder_of(piece, decode_weight(piece, local(old)), dtype), param)


def choose_form(state: dict[str, Any], param: Tensor, *, one_buffer: bool, gamma: float) -> None:
    """Turn m_t and g_{t-1} into e_t where one buffer suffices from now on, or e_t into m_t where it no longer does.

    m_t = (1-gamma) e_t + gamma g_t. Without g_t, e_t itself has to stand for m_t, and there is no previous gradient.
    """
    old, new = ("exp_avg", "exp_avg_grad") if one_buffer else ("exp_avg_grad", "exp_avg")
    if old not in state or new in state:
        return
    dtype = arithmetic_dtype(param).to_real()
    values = formats.decode(real(state[old]), state.get(f"{old}_scale"), dtype)
    if one_buffer and "prev_grad" in state:
        prev = formats.decode(real(state["prev_grad"]), state.get("prev_grad_scale"), dtype)
        weight = gamma * state.get(_COEFFICIENT, 1.0) * state["has_prev"].to(prev.device)
        values = (values - prev * weight) / (1 - gamma * state["has_prev"].to(prev.device))
    elif "has_prev" in state:
        state["has_prev"].zero_()
    discard(state, old)
    complete(state, param, new)
    real(state[new]).copy_(values)


def discard(state: dict[str, Any], name: str) -> None:
    """Remove a state tensor and what belongs to it."""
    for key in (name, f"{name}_scale", *((_COEFFICIENT,) if name == "prev_grad" else ())):
        state.pop(key, None)


def keep_params(state: dict[str, Any], param: Tensor) -> None:
    """Remember the parameter's present value as `prev_param`."""
    if "prev_param" in state:
        local(state["prev_param"]).copy_(local(param))
    else:
        state["prev_param"] = param.detach().clone(memory_format=torch.preserve_format)


def drop_params(state: dict[str, Any], param: Tensor) -> None:
    """Forget what `keep_params` has kept."""
    state.pop("prev_param", None)


class Shielded:
    """A state tensor on its way through `Optimizer.load_state_dict`, which would cast it to the parameter's dtype."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


def shield(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict whose state tensors `Optimizer.load_state_dict` leaves alone."""
    states = cast("dict[Any, dict[str, Any]]", state_dict["state"])
    state = {
        key: {name: Shielded(value) if isinstance(value, Tensor) else value for name, value in entries.items()}
        for key, entries in states.items()
    }
    return {**state_dict, "state": state}


def check_shapes(name: str, param: Tensor, state: dict[str, Any]) -> None:
    """Raise ValueError where a state tensor about to be loaded has not the shape of its parameter."""
    for key, value in state.items():
        tensor = value.value if isinstance(value, Shielded) else value
        if not isinstance(tensor, Tensor) or key in (*_SCALARS, _COEFFICIENT) or key.endswith("_scale"):
            continue
        as_pairs = param.is_complex() and tensor.shape == (*param.shape, 2)
        if tensor.shape != param.shape and not as_pairs:
            raise ValueError(
                f"parameter {name} has shape {tuple(param.shape)}, but its {key} in the state dict has "
                f"{tuple(tensor.shape)}; load into the model, and the parameter order, that it was saved from"
            )


def restore(
    state: dict[str, Any], param: Tensor, *, capturable: bool, state_precision: str | dict[str, str], rounding: str
) -> dict[str, Any]:
    """Undo `shield`: put each tensor on its device, in the precision of this optimizer.

    Scalars may be numbers in old checkpoints.
    """
    restored: dict[str, Any] = {}
    state = _spread_like(state, param)
    for name, value in state.items():
        tensor = value.value if isinstance(value, Shielded) else value
        if name in _SCALARS:
            tensor = torch.as_tensor(tensor, device=param.device if capturable else "cpu")
            restored[name] = tensor.clone() if tensor.dtype.is_floating_point else tensor.float()
        elif not isinstance(value, Shielded):
            restored[name] = value
        else:
            restored[name] = tensor.to(param.device, param.dtype if name == "prev_param" else tensor.dtype)
    for name in list(restored):
        is_moment = name not in (*_SCALARS, _COEFFICIENT, "prev_param", "param_remainder")
        if isinstance(state[name], Shielded) and is_moment and not name.endswith("_scale"):
            complete(restored, param, name, formats.precision_of(state_precision, name))
    complete_remainder(restored, param, rounding)
    return restored


def _spread_like(state: dict[str, Any], param: Tensor) -> dict[str, Any]:
    """Return shielded state with its tensors spread over ranks as `param` is; they may come from any other layout."""
    result = dict(state)
    for name, value in state.items():
        if not isinstance(value, Shielded) or value.value.shape[: param.ndim] != param.shape or name in _SCALARS:
            continue
        tensor = value.value
        if not is_dtensor(tensor) and not is_dtensor(param):
            continue
        if is_dtensor(tensor) and is_dtensor(param) and spread_of(tensor) is spread_of(param):
            continue
        scale = result.pop(f"{name}_scale", None)
        whole = cast(Any, tensor).full_tensor() if is_dtensor(tensor) else tensor
        if scale is not None:
            whole = formats.decode(whole, scale.value, torch.float32)
        result[name] = Shielded(piece_of(whole.to(param.device), param) if is_dtensor(param) else whole)
    return result


def portable(state: dict[str, Any]) -> dict[str, Any]:
    """Return a parameter's state as it may be saved: 8-bit pieces, whose scales belong to this rank, as fp32 values."""
    result = dict(state)
    for name, tensor in state.items():
        if f"{name}_scale" in state and is_dtensor(tensor):
            values = formats.decode(local(tensor), result.pop(f"{name}_scale"), torch.float32)
            result[name] = like(values, tensor)
    return result
