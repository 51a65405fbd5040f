"""Checkpoints as plain state dicts, for `torch.save`, `torch.load` and tools that know nothing else.

model                by name
optimizer            a list of `optimizer.state_dict()`, one for each optimizer, loadable into it
parameter_names      for each of them the names of its parameters, in order
random               the random generators of each process
step, schedulers, ...
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mars_lab.errors import InputError
from mars_lab.ranks import Ranks
from mars_lab.training.checkpoint import dcp, loader
from mars_lab.training.checkpoint.contents import MODEL, OPTIMIZER, RANDOM, Contents, by_index, with_indices
from mars_lab.training.checkpoint.folder import newest_first
from mars_lab.training.checkpoint.random_state import packed, unpacked
from mars_lab.training.checkpoint.saver import Saver


def read(path: Path) -> dict[str, Any]:
    """A checkpoint as a plain state dict, whole tensors on the CPU, whatever number of processes saved it."""
    tensors = {key: torch.empty(what.shape, dtype=what.dtype) for key, what in dcp.stored_tensors(path).items()}
    loader.read_into(path, tensors, Ranks())
    values = loader.read_values(path)
    parts: list[list[dict[str, Any]]] = values.pop("param_groups")
    names = [[name for group in groups for name in group["params"]] for groups in parts]
    model = _below(tensors, MODEL)
    return {
        **values,
        "model": model | {name: model[original] for name, original in values["tied"].items()},
        "optimizer": [
            {"state": by_index(tensors, ordered), "param_groups": with_indices(groups)}
            for ordered, groups in zip(names, parts, strict=True)
        ],
        "parameter_names": names,
        "random": [unpacked(value) for _, value in sorted(_below(tensors, RANDOM).items(), key=lambda kv: int(kv[0]))],
    }


def read_newest(folder: Path) -> dict[str, Any] | None:
    """The newest undamaged checkpoint as a plain state dict; None if there is none yet. Raises as `newest_good`."""
    path = loader.newest_good(folder, Ranks())
    return None if path is None else read(path)


def contents_of(state: dict[str, Any]) -> Contents:
    """Undo `read`.

    Raises:
        InputError: a key is missing.
    """
    state = dict(state)
    try:
        model = state.pop("model").items()
        tensors = {MODEL + name: value for name, value in model if name not in state["tied"]}
        groups: list[list[dict[str, Any]]] = []
        for part, names in zip(state.pop("optimizer"), state.pop("parameter_names"), strict=True):
            for index, entries in part["state"].items():
                tensors |= {f"{OPTIMIZER}{names[index]}.{entry}": value for entry, value in entries.items()}
            groups.append([{**g, "params": [names[index] for index in g["params"]]} for g in part["param_groups"]])
        tensors |= {f"{RANDOM}{rank}": packed(value) for rank, value in enumerate(state.pop("random"))}
    except KeyError as error:
        raise InputError(f"the state dict has no {error}; it must have what `mars export` writes") from None
    return Contents(tensors, {**state, "param_groups": groups})


def export(folder: Path, file: Path) -> int:
    """Write the newest good checkpoint in `folder` with `torch.save`; returns its step.

    Raises:
        InputError: there is no checkpoint, or all are damaged.
    """
    state = read_newest(folder)
    if state is None:
        raise InputError(f"{folder} holds no checkpoint yet; train first")
    partial = file.with_name(f".{file.name}.partial")
    torch.save(state, partial)
    partial.replace(file)
    return state["step"]


def import_(file: Path, folder: Path) -> int:
    """Make a file of `export` the newest checkpoint in `folder`; returns its step.

    Raises:
        InputError: the file can't be read, or lacks something, or the folder has a checkpoint of that step or later.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever unpickling comes across
        raise InputError(f"{file} is no file of torch.save that can be read safely: {error}") from None
    if not isinstance(state, dict) or "step" not in state:
        raise InputError(f"{file} holds no training state; give a file that `mars export` has written")
    contents = contents_of(state)
    newest = next(iter(newest_first(folder)), None)
    if newest is not None and newest.name >= f"step-{state['step']:08}":
        raise InputError(f"{newest} is not older than step {state['step']} of {file}; move it away first")
    with Saver(folder, Ranks(), num_kept=2**31) as saver:
        saver.save(state["step"], contents)
    return state["step"]


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
