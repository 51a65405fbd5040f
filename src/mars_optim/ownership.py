"""Who else holds a tensor's memory: whether a gradient may become the previous one without a copy."""
# These parts of torch are not typed.
# pyright: reportPrivateUsage=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false, reportUnknownArgumentType=false

from __future__ import annotations

from array import array
from collections.abc import Sequence
from sys import getrefcount
from typing import Any

import torch
from torch import Tensor

# The tensor and the storage object that is asked; for the tensor itself `p.grad` and its Python object.
_SOLE = 2


def keep(grad: Tensor) -> Tensor | None:
    """Return a tensor of the values that `grad` has now, sharing its memory; None where that cannot be proved safe.

    The memory becomes copy-on-write: whoever writes to `p.grad` later through torch, be it `zero_()`, accumulation or
    an all-reduce, gets a copy then, and the value kept stays. What writes past torch is recognised beforehand: a
    gradient that is a view of something larger (DDP's buckets), whose memory numpy or DLPack has been handed, or that
    other processes share, has more than one owner. Accelerator memory may belong to a CUDA graph, which leaves no
    trace on the tensor, so it is never kept.
    """
    if type(grad) is not Tensor or not grad.is_cpu or torch.compiler.is_compiling():
        return None
    storage = grad.untyped_storage()
    is_sole_owner = torch._C._storage_Use_Count(storage._cdata) == _SOLE and grad._use_count() == _SOLE
    if not is_sole_owner or storage.nbytes() != grad.numel() * grad.itemsize or grad.requires_grad:
        return None
    try:
        return torch._lazy_clone(grad)
    except RuntimeError:  # memory of another allocator: shared, pinned, numpy's
        return None


def is_held_by_its_state_alone(tensors: Sequence[Any], i: int) -> bool:
    """Whether nobody but this sequence and a state holds its tensor, as a copied state would, or sees its memory."""
    storage = tensors[i].untyped_storage()
    return (
        _num_references(tensors, i) == _HELD_TWICE
        and torch._C._storage_Use_Count(storage._cdata) == _SOLE
        and getrefcount(storage) == _STORAGE_UNHELD
    )


def _num_references(objects: Sequence[Any], i: int) -> int:
    return getrefcount(objects[i])


def _num_references_to_storage(tensor: Tensor) -> int:
    storage = tensor.untyped_storage()
    return getrefcount(storage)


# How many there are of what nobody else holds, interpreters and torch being free to keep some of their own.
_objects = [object()]
_state = {"prev_grad": _objects[0]}
_HELD_TWICE = _num_references(_objects, 0)
_STORAGE_UNHELD = _num_references_to_storage(torch.empty(1, device="cpu"))
del _objects, _state


def read_only_addresses(tensors: Sequence[Tensor]) -> array[int]:
    """Return where each one's elements start, for reading only: `data_ptr()` would end copy-on-write, by copying."""
    starts: array[int] = array("Q", map(torch._C._data_address, tensors))
    if any(map(Tensor.storage_offset, tensors)):
        return array(
            "Q", [start + int(t.storage_offset()) * t.itemsize for start, t in zip(starts, tensors, strict=True)]
        )
    return starts
