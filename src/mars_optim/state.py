"""How optimizer state is created, stored and loaded.

State per parameter: `step` and the flag `has_prev` (scalars), `exp_avg`, what the preconditioner keeps, and
`prev_grad` (approx) or `prev_param` (exact). Scalars live on the CPU, where reading them makes nobody wait, unless
the step is capturable. Tensors have the parameter's dtype, except that half-precision parameters have fp32 state:
a bfloat16 moment cannot hold increments of 1%.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor

_SCALARS = ("step", "has_prev")


def arithmetic_dtype(param: Tensor) -> torch.dtype:
    """Return the dtype of a parameter's state and arithmetic."""
    return torch.float32 if param.dtype in (torch.float16, torch.bfloat16) else param.dtype


def complete(state: dict[str, Any], param: Tensor, names: Iterable[str], *, capturable: bool) -> None:
    """Create what is missing of the scalar and tensor state called `names`, as zeros."""
    scalar_device = param.device if capturable else torch.device("cpu")
    for name in names:
        if name in _SCALARS:
            if name not in state:
                dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
                state[name] = torch.zeros((), dtype=dtype, device=scalar_device)
            elif state[name].device != scalar_device:  # `capturable` was switched; torch.compile does so by itself
                state[name] = state[name].to(scalar_device)
        elif name not in state:
            dtype = arithmetic_dtype(param)
            state[name] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)


def keep_params(state: dict[str, Any], param: Tensor) -> None:
    """Remember the parameter's present value as `prev_param`."""
    if "prev_param" in state:
        state["prev_param"].copy_(param)
    else:
        state["prev_param"] = param.detach().clone(memory_format=torch.preserve_format)


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
        if key not in _SCALARS and isinstance(tensor, Tensor) and tensor.shape != param.shape:
            raise ValueError(
                f"parameter {name} has shape {tuple(param.shape)}, but its {key} in the state dict has "
                f"{tuple(tensor.shape)}; load into the model, and the parameter order, that it was saved from"
            )


def restore(state: dict[str, Any], param: Tensor, *, capturable: bool) -> dict[str, Any]:
    """Undo `shield`: put each tensor on its device, in its dtype. Scalars may be numbers in old checkpoints."""
    restored: dict[str, Any] = {}
    for name, value in state.items():
        tensor = value.value if isinstance(value, Shielded) else value
        if name in _SCALARS:
            tensor = torch.as_tensor(tensor, device=param.device if capturable else "cpu")
            restored[name] = tensor.clone() if tensor.dtype.is_floating_point else tensor.float()
        elif not isinstance(value, Shielded):
            restored[name] = value
        else:
            dtype = param.dtype if name == "prev_param" else arithmetic_dtype(param)
            restored[name] = tensor.to(device=param.device, dtype=dtype)
    return restored
