"""What a checkpoint holds, independent of how many processes hold it.

Tensors go by the names of parameters, as in `torch.distributed.checkpoint.state_dict`:

    model.<name>                      parameters and persistent buffers; tied ones once
    optimizer.state.<name>.<entry>    the optimizers' state
    random.<rank>                     the states of a process's random generators, as bytes

Everything else (step, hyperparameters, schedules, configuration) is the same on every process, and plain values.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mars_lab.errors import InputError
from mars_lab.training.checkpoint.dcp import Stored

MODEL, OPTIMIZER, RANDOM = "model.", "optimizer.state.", "random."


@dataclass(frozen=True)
class Contents:
    """A checkpoint's `tensors` by key, sharded ones as DTensors, and its plain `values`."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of `model` by key; the memory is the model's own."""
    persistent = model.state_dict(keep_vars=True)
    own = {name: value for name, value in (*model.named_parameters(), *model.named_buffers()) if name in persistent}
    return {MODEL + name: value.detach() for name, value in own.items()}


def tied_names(model: nn.Module) -> dict[str, str]:
    """Names in the model's state dict that only repeat a tensor, with the name that `model_tensors` has for it."""
    names = {value: name for name, value in (*model.named_parameters(), *model.named_buffers())}
    repeated = model.state_dict(keep_vars=True).items()
    return {name: names[value] for name, value in repeated if names[value] != name}


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """The optimizer's state by key; the memory is the optimizer's own."""
    ordered = _names_in_order(optimizer, names)
    found: dict[str, Tensor] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for entry, value in state.items():
            assert isinstance(value, Tensor), f"{entry} of {ordered[index]} is no tensor"
            found[f"{OPTIMIZER}{ordered[index]}.{entry}"] = value
    return found


def optimizer_groups(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> list[dict[str, Any]]:
    """The optimizer's parameter groups with names for parameters."""
    ordered = _names_in_order(optimizer, names)
    groups = optimizer.state_dict()["param_groups"]
    return [{**group, "params": [ordered[index] for index in group["params"]]} for group in groups]


def destinations(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], stored: Mapping[str, Stored]
) -> dict[str, Tensor]:
    """Memory to load the optimizer's state into, laid out as its parameters are now.

    What exists is decided by the checkpoint, so that no step has to be taken to make the state exist.
    """
    parameters = {names[p]: p for group in optimizer.param_groups for p in group["params"]}
    found: dict[str, Tensor] = {}
    for key, what in stored.items():
        if not key.startswith(OPTIMIZER):
            continue
        name = key.removeprefix(OPTIMIZER).rpartition(".")[0]
        if (parameter := parameters.get(name)) is None:
            continue  # another optimizer's
        if isinstance(parameter, DTensor) and what.shape == parameter.shape:
            found[key] = torch.empty_like(parameter.detach(), dtype=what.dtype)
        else:
            device = parameter.device if what.shape else "cpu"  # step counts live where reading them is free
            found[key] = torch.empty(what.shape, dtype=what.dtype, device=device)
    return found


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Mapping[Tensor, str],
    tensors: Mapping[str, Tensor],
    groups: list[dict[str, Any]],
) -> None:
    """Undo `optimizer_tensors` and `optimizer_groups`.

    Raises:
        InputError: the checkpoint's groups hold other parameters.
    """
    own = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    if own != [group["params"] for group in groups]:
        raise InputError(
            "the optimizer in the checkpoint groups its parameters otherwise than this one; continue the run with the "
            "optimizer and the version of mars-optim it was started with"
        )
    state = by_index(tensors, [name for part in own for name in part])
    optimizer.load_state_dict({"state": state, "param_groups": with_indices(groups)})


def by_index(tensors: Mapping[str, Tensor], ordered: Iterable[str]) -> dict[int, dict[str, Tensor]]:
    """Optimizer state by the position of its parameter among the names `ordered`, as torch's state dicts have it."""
    place = {name: index for index, name in enumerate(ordered)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, entry = key.removeprefix(OPTIMIZER).rpartition(".")
        if key.startswith(OPTIMIZER) and name in place:
            state.setdefault(place[name], {})[entry] = value
    return dict(sorted(state.items()))


def with_indices(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups with positions for names, as torch's state dicts have them."""
    first, out = 0, []
    for group in groups:
        out.append({**group, "params": list(range(first, first + len(group["params"])))})
        first += len(group["params"])
    return out


def _names_in_order(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> list[str]:
    return [names[p] for group in optimizer.param_groups for p in group["params"]]
