"""Preconditioners: from the momentum m_t to the direction H_t^{-1} m_t of the step.

A preconditioner is an entry of a table. To add one, write an `update_` in terms of the backend's functions (usually
`momentum_`, then a direction, then `descend_`) and register it; the optimizer needs no change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .backends import Backend
from .batch import Batch, Treatment
from .polar import matrices, polar_factors, update_scale


@dataclass(frozen=True)
class Preconditioner:
    """How momentum becomes a step.

    Attributes:
        update_: advances the batch's state and parameters by one step.
        state_names: tensors of the parameter's shape it keeps beside the momentum.
        needs_momentum_only: it looks at m_t alone, as `momentum_` returns it, not at the second moment of c~_t.
        matrix_only: it means nothing for a tensor with fewer than two dimensions, nor for complex numbers.
    """

    update_: Callable[[Backend, Batch], None]
    state_names: Callable[[Treatment], tuple[str, ...]] = lambda treatment: ()
    matrix_only: bool = False
    needs_momentum_only: bool = False


def polar_(backend: Backend, batch: Batch) -> None:
    """x <- x - lr * (scale * polar(m_t) + weight_decay * x), for each matrix of the tensor by itself."""
    momenta, treatment = backend.momentum_(batch), batch.treatment
    directions = [torch.empty_like(m, memory_format=torch.contiguous_format) for m in momenta]
    moments: list[Tensor] = []
    blocks: list[Tensor] = []
    for m, direction in zip(momenta, directions, strict=True):
        if torch.is_grad_enabled():
            m = m.clone()  # differentiable: the next step overwrites the momentum that this one's graph needs
        moments += matrices(m, treatment.matrix_view)
        blocks += matrices(direction, treatment.matrix_view)
    for block, factor in zip(blocks, polar_factors(moments, treatment.polar), strict=True):
        rows, columns = block.shape[-2:]
        scale = update_scale(treatment.update_scale, rows, columns, transposed=treatment.matrix_transposed)
        block.copy_(factor * scale)
    backend.descend_(batch, directions, [1.0] * len(directions))


def _adamw_state(treatment: Treatment) -> tuple[str, ...]:
    return ("exp_avg_sq", "max_exp_avg_sq") if treatment.amsgrad else ("exp_avg_sq",)


PRECONDITIONERS: dict[str, Preconditioner] = {
    "adamw": Preconditioner(lambda backend, batch: backend.adamw_(batch), _adamw_state),
    "lion": Preconditioner(lambda backend, batch: backend.lion_(batch), needs_momentum_only=True),
    "polar": Preconditioner(polar_, matrix_only=True, needs_momentum_only=True),
}


def register_preconditioner(name: str, preconditioner: Preconditioner) -> None:
    """Make `preconditioner=name` available to every parameter group.

    Raises:
        ValueError: the name is taken.
    """
    if name in PRECONDITIONERS:
        raise ValueError(f"a preconditioner named {name!r} is already registered; choose another name")
    PRECONDITIONERS[name] = preconditioner
