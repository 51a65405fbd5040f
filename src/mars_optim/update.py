"""One step of all batches: norms, weights, preconditioned update, with state at hand or brought from the host."""

# pyright: reportPrivateImportUsage=false, reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from . import backends
from .backends import Backend
from .batch import Batch
from .correction import products_of, total_norm, weigh
from .offload import Lane, chunked
from .preconditioners import PRECONDITIONERS


def update_(
    resident: Sequence[tuple[Batch, Backend]],
    offloaded: Sequence[tuple[Batch, Backend]],
    lanes: dict[torch.device, Lane],
) -> None:
    """Advance the state and parameters of every batch.

    Args:
        resident: batches with their state on the device, each with its backend.
        offloaded: batches with their state in the host's memory.
        lanes: what carries state to each device; filled as needed.
    """
    read = [(batch if backend.reads_storage else backends.unpack(batch), backend) for batch, backend in resident]
    products = [products_of(batch, backend) for batch, backend in read]
    # The total norm needs no state: what is offloaded visits once.
    stateless = [(replace(batch, prev_grads=None), backend) for batch, backend in offloaded if _is_clipped(batch)]
    readable = [(batch if backend.reads_storage else backends.unpack(batch), backend) for batch, backend in stateless]
    total = total_norm(
        [batch for batch, _ in (*read, *readable)],
        [*products, *(backend.gradient_products(batch) for batch, backend in readable)],
    )
    for (batch, backend), product in zip(read, products, strict=True):
        _update_one(batch, backend, product, total)
    for device in {batch.params[0].device for batch, _ in offloaded}:
        here = [(b, backend) for batch, backend in offloaded for b in chunked(batch) if b.params[0].device == device]
        visits = lanes.setdefault(device, Lane(device)).visits([batch for batch, _ in here])
        for visitor, (_, backend) in zip(visits, here, strict=True):
            visitor = visitor if backend.reads_storage else backends.unpack(visitor)
            _update_one(visitor, backend, products_of(visitor, backend), total)


def _update_one(batch: Batch, backend: Backend, product: Tensor | None, total: Tensor | None) -> None:
    weigh(batch, backend, product, total)
    PRECONDITIONERS[batch.treatment.preconditioner].update_(backend, batch)
    backends.pack_(batch)
    _keep_coefficient(batch)


def _is_clipped(batch: Batch) -> bool:
    return batch.treatment.max_grad_norm is not None


def _keep_coefficient(batch: Batch) -> None:
    """Remember the factor of this step's global clipping with the raw gradients that were kept."""
    states = [state for state in batch.owners if "prev_grad" in state]
    if not states:
        return
    if isinstance(batch.steps[0], Tensor):  # capturable: addresses must stay
        kept: list[Tensor] = [state["prev_coefficient"] for state in states]
        now = batch.coefficient
        now = now.to(kept[0]) if isinstance(now, Tensor) else torch.full_like(kept[0], now)
        if batch.scaling is None:
            torch._foreach_copy_(kept, [now] * len(kept))
        else:
            skips = batch.scaling.found_inf.reshape(()) != 0
            torch._foreach_copy_(kept, list(torch.where(skips, torch.stack(kept), now).unbind()))
        return
    for state in states:
        if isinstance(batch.coefficient, Tensor):
            state["prev_coefficient"] = batch.coefficient.detach()
        else:
            state.pop("prev_coefficient", None)
