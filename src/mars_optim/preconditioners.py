"""Preconditioners: from the momentum m_t to the direction H_t^{-1} m_t of the step.

A preconditioner is an entry of a table. To add one, write an `update_` in terms of the backend's functions (usually
`momentum_`, then a direction, then `descend_`) and register it; the optimizer needs no change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .backends import Backend
from .batch import Batch, Treatment
from .polar import matrices, matrix_shape, parts, polar_factors, polar_work, update_scale
from .sharding import Job, exchange_, gather_, intersection, wires, within


@dataclass(frozen=True)
class Preconditioner:
    """How momentum becomes a step.

    Attributes:
        update_: advances the batch's state and parameters by one step.
        is_elementwise: `update_` treats each element by itself, so that it is right for a piece of a tensor.
        update_together_: takes the step of several batches whose tensors are spread over ranks, with their backends;
            None: each batch by itself, by `update_`. The last argument asks for the simplest way, by gathering all.
        state_names: tensors of the parameter's shape it keeps beside the momentum.
        needs_momentum_only: it looks at m_t alone, as `momentum_` returns it, not at the second moment of c~_t.
        matrix_only: it means nothing for a tensor with fewer than two dimensions, nor for complex numbers.
    """

    update_: Callable[[Backend, Batch], None]
    state_names: Callable[[Treatment], tuple[str, ...]] = lambda treatment: ()
    matrix_only: bool = False
    needs_momentum_only: bool = False
    is_elementwise: bool = False
    update_together_: Callable[[Sequence[tuple[Batch, Backend]], bool], None] | None = None


def polar_(backend: Backend, batch: Batch) -> None:
    """x <- x - lr * (scale * polar(m_t) + weight_decay * x), for each matrix of the tensor by itself."""
    momenta, treatment = backend.momentum_(batch), batch.treatment
    if torch.is_grad_enabled():
        momenta = [m.clone() for m in momenta]  # differentiable: the next step overwrites what this one's graph needs
    blocks = [matrices(m, treatment.matrix_view) for m in momenta]
    factors = iter(polar_factors([block for own in blocks for block in own], treatment.polar))
    directions: list[Tensor] = []
    scales: list[float] = []
    for m, own in zip(momenta, blocks, strict=True):
        sizes = [
            update_scale(treatment.update_scale, *block.shape[-2:], transposed=treatment.matrix_transposed)
            for block in own
        ]
        if len(own) == 1:
            directions.append(next(factors).reshape(m.shape))
            scales += sizes
        else:
            directions.append(torch.empty_like(m, memory_format=torch.contiguous_format))
            scales.append(1.0)
            for block, size in zip(matrices(directions[-1], treatment.matrix_view), sizes, strict=True):
                block.copy_(next(factors) * size)
    backend.descend_(batch, directions, scales)


def polar_together_(ready: Sequence[tuple[Batch, Backend]], gathers: bool) -> None:
    """The same for tensors that are spread over ranks: each matrix is orthogonalised whole, by one of them."""
    jobs: list[Job] = []
    treatments: list[Treatment] = []
    pending: list[tuple[Batch, Backend, list[Tensor]]] = []
    for batch, backend in ready:
        momenta = backend.momentum_(batch)
        directions = [torch.empty_like(m, memory_format=torch.contiguous_format) for m in momenta]
        jobs += [_job(batch, i, m, d) for i, (m, d) in enumerate(zip(momenta, directions, strict=True))]
        treatments += [batch.treatment] * len(momenta)
        pending.append((batch, backend, directions))

    def compute(blocks: list[tuple[int, Tensor]]) -> list[Tensor]:
        results: list[Tensor | None] = [None] * len(blocks)
        by_method: dict[object, list[int]] = {}
        for i, (job, _) in enumerate(blocks):
            by_method.setdefault(treatments[job].polar, []).append(i)
        for places in by_method.values():
            flat = [matrices(blocks[i][1], _whole(treatments[blocks[i][0]]))[0] for i in places]
            factors = polar_factors(flat, treatments[blocks[places[0]][0]].polar)
            for i, factor in zip(places, factors, strict=True):
                results[i] = factor.reshape(blocks[i][1].shape)
        return [result for result in results if result is not None]

    (gather_ if gathers else exchange_)(jobs, compute)
    for job, treatment in zip(jobs, treatments, strict=True):
        _scale_(job, treatment)
    for batch, backend, directions in pending:
        backend.descend_(batch, directions, [1.0] * len(directions))


def _job(batch: Batch, i: int, momentum: Tensor, direction: Tensor) -> Job:
    assert batch.spread is not None
    assert batch.shapes is not None
    assert batch.indices is not None
    treatment, shape = batch.treatment, batch.shapes[i]
    boxes = parts(shape, treatment.matrix_view)
    # bfloat16 reaches as far as fp32, so that cutting off digits before normalising is as good as after.
    without_loss = "bf16" if treatment.polar.arithmetic(momentum) == torch.bfloat16 else "fp32"
    return Job(
        index=batch.indices[i],
        momentum=momentum,
        direction=direction,
        spread=batch.spread,
        shape=shape,
        parts=boxes,
        works=tuple(polar_work(*matrix_shape(box, treatment.matrix_view), treatment.polar) for box in boxes),
        wires=wires(treatment.exchange_precision or without_loss, momentum.dtype),
    )


def _whole(treatment: Treatment) -> str:
    """The view of a part by itself."""
    return "stack" if treatment.matrix_view == "stack" else "flatten"


def _scale_(job: Job, treatment: Treatment) -> None:
    mine = job.spread.cut(job.shape).boxes[job.spread.shard]
    for box in job.parts:
        shared = intersection(box, mine)
        if shared is not None:
            rows, columns = matrix_shape(box, treatment.matrix_view)
            scale = update_scale(treatment.update_scale, rows, columns, transposed=treatment.matrix_transposed)
            job.direction[within(shared, mine)] *= scale


def _adamw_state(treatment: Treatment) -> tuple[str, ...]:
    return ("exp_avg_sq", "max_exp_avg_sq") if treatment.amsgrad else ("exp_avg_sq",)


PRECONDITIONERS: dict[str, Preconditioner] = {
    "adamw": Preconditioner(
        lambda backend, batch: backend.adamw_(batch), is_elementwise=True, state_names=_adamw_state
    ),
    "lion": Preconditioner(lambda backend, batch: backend.lion_(batch), is_elementwise=True, needs_momentum_only=True),
    "polar": Preconditioner(polar_, update_together_=polar_together_, matrix_only=True, needs_momentum_only=True),
}


def register_preconditioner(name: str, preconditioner: Preconditioner) -> None:
    """Make `preconditioner=name` available to every parameter group.

    Raises:
        ValueError: the name is taken.
    """
    if name in PRECONDITIONERS:
        raise ValueError(f"a preconditioner named {name!r} is already registered; choose another name")
    PRECONDITIONERS[name] = preconditioner
