"""`torch.distributed.checkpoint`, with and without other processes."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


@dataclass(frozen=True)
class Stored:
    """Shape and dtype of a tensor in a checkpoint."""

    shape: torch.Size
    dtype: torch.dtype


def save(tensors: dict[str, Any], folder: Path, group: dist.ProcessGroup | None) -> None:
    """Write this process's part of `tensors` into `folder`, flushed; None for `group` means alone."""
    writer = FileSystemWriter(folder)
    with _expecting_to_be_alone(group is None):
        state_dict_saver.save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)


def load(tensors: dict[str, Tensor], folder: Path, *, is_alone: bool) -> None:
    """Fill `tensors`, whatever part of each a process holds, from `folder`."""
    with _expecting_to_be_alone(is_alone):
        state_dict_loader.load(dict(tensors), storage_reader=FileSystemReader(folder), no_dist=is_alone)


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """What tensors a checkpoint holds, by key."""
    metadata = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {
        key: Stored(what.size, what.properties.dtype)
        for key, what in metadata.items()
        if isinstance(what, TensorStorageMetadata)
    }


@contextmanager
def _expecting_to_be_alone(is_alone: bool) -> Iterator[None]:
    """DCP warns of what `no_dist=True` has asked for."""
    if not is_alone:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield
