"""One step of all batches: norms, weights, preconditioned update, with state at hand or brought from the host."""

# pyright: reportPrivateImportUsage=false, reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from . import backends
from .backends import Backend
from .batch import Batch
from .correction import products_of, total_norm, weigh
from .offload import Lane, chunked
from .preconditioners import PRECONDITIONERS
from .ranks import Ranks
from .sharding import add_shards
from .spares import Spares


def update_(
    resident: Sequence[tuple[Batch, Backend]],
    offloaded: Sequence[tuple[Batch, Backend]],
    lanes: dict[torch.device, Lane],
    spares: Spares,
    ranks: Ranks,
) -> None:
    """Advance the state and parameters of every batch.

    Args:
        resident: batches with their state on the device, each with its backend.
        offloaded: batches with their state in the host's memory.
        lanes: what carries state to each device; filled as needed.
        spares: places for previous gradients of resident batches.
        ranks: what the batches of this rank are a part of.
    """
    read = [(batch if backend.reads_storage else backends.unpack(batch), backend) for batch, backend in resident]
    products = _add_shards([products_of(batch, backend) for batch, backend in read], read, ranks.num_params)
    # The total norm needs no state: what is offloaded visits once.
    stateless = [(replace(batch, prev_grads=None), backend) for batch, backend in offloaded if _is_clipped(batch)]
    readable = [(batch if backend.reads_storage else backends.unpack(batch), backend) for batch, backend in stateless]
    total = total_norm(
        [batch for batch, _ in (*read, *readable)],
        [*products, *(backend.gradient_products(batch) for batch, backend in readable)],
        ranks.replicas,
        ranks.device if ranks.is_clipped else None,
    )
    for (batch, backend), product in zip(read, products, strict=True):
        weigh(batch, backend, product, total)
    _update(read, ranks, spares)
    for device in {batch.params[0].device for batch, _ in offloaded}:
        here = [(b, backend) for batch, backend in offloaded for b in chunked(batch) if b.params[0].device == device]
        visits = lanes.setdefault(device, Lane(device)).visits([batch for batch, _ in here])
        for visitor, (_, backend) in zip(visits, here, strict=True):
            visitor = visitor if backend.reads_storage else backends.unpack(visitor)
            weigh(visitor, backend, products_of(visitor, backend), total)
            _update([(visitor, backend)], ranks)


def _add_shards(
    products: list[Tensor | None], read: Sequence[tuple[Batch, Backend]], num_params: int
) -> list[Tensor | None]:
    places = [i for i, product in enumerate(products) if product is not None]
    sums = add_shards(
        [cast(Tensor, products[i]) for i in places],
        [read[i][0].spread for i in places],
        [read[i][0].indices or [] for i in places],
        num_params,
    )
    whole = list(products)
    for i, total in zip(places, sums, strict=True):
        whole[i] = total
    return whole


def _update(ready: Sequence[tuple[Batch, Backend]], ranks: Ranks, spares: Spares | None = None) -> None:
    together: dict[str, list[tuple[Batch, Backend]]] = {}
    for batch, backend in ready:
        preconditioner = PRECONDITIONERS[batch.treatment.preconditioner]
        if batch.spread is not None and preconditioner.update_together_ is not None:
            together.setdefault(batch.treatment.preconditioner, []).append((batch, backend))
        else:
            with nullcontext() if spares is None else spares.lent(batch, backend):
                preconditioner.update_(backend, batch)
    for name in sorted(together):  # in the same order on all ranks
        update_together_ = PRECONDITIONERS[name].update_together_
        assert update_together_ is not None
        update_together_(together[name], ranks.gathers)
    for batch, _ in ready:
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
