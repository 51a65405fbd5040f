"""Finding the newest good checkpoint and reading it into whatever layout the training has now."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mars_lab.errors import InputError
from mars_lab.ranks import Ranks
from mars_lab.training.checkpoint import dcp
from mars_lab.training.checkpoint import folder as folders
from mars_lab.training.checkpoint.saver import VALUES


def newest_good(folder: Path, ranks: Ranks) -> Path | None:
    """The newest undamaged checkpoint, the same on all `ranks`; None if there is no checkpoint yet.

    A damaged checkpoint is named on stderr and the one before it is used. Each process reads its share of the files.

    Raises:
        InputError: there are checkpoints, and all of them are damaged.
    """
    candidates = ranks.from_first(folders.newest_first(folder))
    for path in candidates:
        problems = ranks.gathered(folders.problem(path, ranks.rank, ranks.size))
        problem = next((p for p in problems if p is not None), None)
        if problem is None:
            return path
        if ranks.is_first:
            print(f"The checkpoint {path} is damaged ({problem}); trying the one before.", file=sys.stderr)
    if candidates:
        raise InputError(f"every checkpoint in {folder} is damaged; start a new run, or restore them from a backup")
    return None


def read_values(path: Path) -> dict[str, Any]:
    """The plain values of a checkpoint."""
    return torch.load(path / VALUES, weights_only=True)


def read_into(path: Path, tensors: dict[str, Tensor], ranks: Ranks) -> None:
    """Fill `tensors`, by key, from a checkpoint; processes may ask for different keys and parts.

    Raises:
        InputError: the checkpoint lacks one of them, or has it in another shape.
    """
    stored = dcp.stored_tensors(path)
    for key, tensor in tensors.items():
        found = stored[key].shape if key in stored else None
        if found != tensor.shape:
            is_how = "is not in it" if found is None else f"has shape {tuple(found)} in it"
            raise InputError(
                f"{path} was saved from another model: {key} of shape {tuple(tensor.shape)} {is_how}; continue it with "
                "the configuration it was started with"
            )
    dcp.load(tensors, path, is_alone=ranks.size == 1)
