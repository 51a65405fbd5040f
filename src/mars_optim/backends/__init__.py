"""Backends: the arithmetic of a step over lists of tensors. The choice between them is made here."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from mars_optim.batch import Batch
from mars_optim.native import NativeUnavailable
from mars_optim.sharding import local

from . import foreach, reference
from .triton import TritonUnavailable
from .unpacked import pack_, unpack

__all__ = ["Backend", "pack_", "select", "unpack"]


_DTYPES = (
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16),
    *(torch.complex64, torch.complex128),
)


class Backend(Protocol):
    """What every backend has, over the lists of a batch. None of them hands out c_t.

    Attributes:
        bounds_clip: wants of the products g.g alone, since norms of g and g' mostly tell that there is nothing to clip.
        reads_storage: takes batches as stored; the others are given unpacked ones.
        unscales: does nothing, on the device, where a batch's `scaling.found_inf` is 1.
        measures_clip: can find ||c_t|| within the step, so that no products are needed without global clipping.
    """

    reads_storage: bool
    measures_clip: bool
    bounds_clip: bool
    unscales: bool

    def gradient_products(self, batch: Batch) -> Tensor:
        """Return (g.g, g.g', g'.g') for each tensor, float64, shape (n, 3): sums, which shards just add."""
        ...

    def momentum_(self, batch: Batch) -> list[Tensor]:
        """m <- beta1 m + (1-beta1) c~, likewise v of c~^2 where the batch has one; keep g_t where asked.

        Returns m_t, to be read only.
        """
        ...

    def descend_(self, batch: Batch, directions: list[Tensor], scales: list[float]) -> None:
        """x <- x - lr * (scale * direction + weight_decay * x); may overwrite `directions`."""
        ...

    def adamw_(self, batch: Batch) -> None:
        """The whole step of `adamw`."""
        ...

    def lion_(self, batch: Batch) -> None:
        """The whole step of `lion`."""
        ...


def select(group: dict[str, Any]) -> Backend:
    """Return the backend of a parameter group, from torch.optim's own switches.

    `fused` kernels are taken where they can run, unless `foreach` says otherwise. Without them lists of tensors go
    through `foreach` where torch has kernels for them; on the CPU it has not: the lists' temporaries cost memory there
    and no time is won.

    Raises:
        RuntimeError: `fused=True` where no fused kernels can run; the message says why.
    """
    if group["differentiable"]:
        return reference
    devices = {device.type for device in {p.device for p in group["params"]}}
    if group["foreach"] is None and group["fused"] is not False and not torch.compiler.is_compiling():
        fused = _fused(devices, group["params"], required=group["fused"] is True)
        if fused is not None:
            return fused
    wanted = devices.isdisjoint({"cpu"}) if group["foreach"] is None else group["foreach"]
    return foreach if wanted else reference


def _fused(devices: set[str], params: Sequence[Tensor], *, required: bool) -> Backend | None:
    """Return the fused kernels for all of `devices`; where they are missing, say so once, or raise if `required`."""
    kinds = {(type(p if type(p) is Parameter else local(p)), p.dtype): p for p in params}  # one of each
    strange = next((p for p in kinds.values() if not _is_plain(p)), None)
    if strange is not None:
        if not required:
            return None
        cause = f"the fused kernels do not take parameters like {type(strange).__name__} of {strange.dtype}"
        return _unavailable(cause, devices, required=required)
    try:
        if devices == {"cpu"}:
            from . import native

            native.require()
            return native
        if devices == {"cuda"}:
            from . import triton

            triton.require()
            return triton
        if not required:
            return None
        cause = f"there are no fused kernels for parameters on {', '.join(sorted(devices))}"
    except (NativeUnavailable, TritonUnavailable) as error:
        cause = str(error)
    return _unavailable(cause, devices, required=required)


def _unavailable(cause: str, devices: set[str], *, required: bool) -> None:
    if required:
        raise RuntimeError(f"fused=True: {cause}; or use fused=None, which takes torch's functions")
    slower = ", about ten times slower" if devices == {"cpu"} else ", in more passes over memory"
    _say_once(f"mars_optim: {cause}. The step uses torch's functions{slower}.")


def _is_plain(param: Tensor) -> bool:
    """Whether the elements lie in memory in a format that kernels know: no wrapper but a DTensor's, no fp8."""
    if type(param) is Parameter:
        return param.dtype in _DTYPES
    param = local(param)
    dispatch = "__torch_dispatch__"
    return getattr(type(param), dispatch) is getattr(Tensor, dispatch) and param.dtype in _DTYPES


@cache
def _say_once(message: str) -> None:
    logging.getLogger("mars_optim").warning(message)
