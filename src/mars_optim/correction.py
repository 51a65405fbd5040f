r"""The corrected gradient and its clipping, as numbers per tensor.

With kappa = gamma * beta1/(1-beta1), s the factor of global clipping and s' the one of the previous gradient,

    c  = s g + kappa (s g - s' g') = s g + kappa s' (s/s' g - g')                          (3.5)
    c~ = c / max(1, ||c|| / clip_norm)                                                     (3.6)

g and g' are raw: clipping rewrites neither. Without it s = s' = 1 and the difference is taken first, so that little
cancels where kappa is large and the difference small (exact mode near gamma = 1). ||c|| follows from the sums g.g,
g.g' and g'.g' in float64 before s is known: one pass and one reduction serve both norms.

In the one-buffer form e_t averages s g instead of c. A start at g'_1 = g_1 differs from the one at g'_1 = 0 by
-gamma beta1^t s g_1 in m_t, which the first step puts into e_1 once and for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .backends import Backend
from .batch import Batch, Scalar
from .sharding import Replicas

# As in torch.nn.utils.clip_grad_norm_, whose result `max_grad_norm` must give.
_NORM_EPS = 1e-6


def products_of(batch: Batch, backend: Backend) -> Tensor | None:
    """Return the sums that the norms of a batch need; None where it needs none."""
    measured_later = batch.treatment.clip_norm is None or _clips_by_itself(batch, backend)
    if measured_later and batch.treatment.max_grad_norm is None:
        return None
    is_bounded = backend.bounds_clip and not batch.is_sharded
    return backend.gradient_products(replace(batch, prev_grads=None) if is_bounded else batch)


def _clips_by_itself(batch: Batch, backend: Backend) -> bool:
    """Whether the backend finds ||c||: it sees all of each tensor."""
    return backend.measures_clip and not batch.is_sharded


def weigh(batch: Batch, backend: Backend, product: Tensor | None, total: Tensor | None) -> None:
    """Set s, the weights of g and g', and the clip factor of a batch. No host sync.

    Args:
        batch: the batch.
        backend: its backend.
        product: its `products_of`.
        total: the norm of all gradients in groups with a `max_grad_norm`; see `total_norm`.
    """
    max_norm, clip_norm = batch.treatment.max_grad_norm, batch.treatment.clip_norm
    unscale: Scalar = 1.0
    if batch.scaling is not None and batch.scaling.scale is not None:
        unscale = 1 / batch.scaling.scale.reshape(())
        batch.coefficient = unscale.to(batch.grads[0].device)
    if max_norm is not None and total is not None:
        clipping = clip_coefficient(total * unscale, max_norm)
        batch.coefficient = (clipping * unscale).to(batch.grads[0].device, _scalar_dtype(batch))
    _set_weights(batch)
    if clip_norm is None:
        batch.clip = 1.0
    elif product is None or (backend.bounds_clip and not batch.is_sharded):
        batch.clip = None
        batch.grad_norms = None if product is None else product[:, 0].sqrt()
    else:
        clip = clip_norm / _corrected_norm(batch, product).clamp(min=clip_norm)
        batch.clip = clip.to(_scalar_dtype(batch))


def _scalar_dtype(batch: Batch) -> torch.dtype:
    return torch.float64 if batch.params[0].dtype == torch.float64 else torch.float32


def _set_weights(batch: Batch) -> None:
    gamma, beta1 = batch.treatment.gamma, batch.treatment.beta1
    seen = batch.sign * batch.coefficient
    batch.grad_weight = seen
    if gamma is None:
        return
    kappa = gamma * (beta1 / (1 - beta1))
    if batch.treatment.one_buffer:
        batch.momentum_weights = (1 - gamma, gamma * seen)
        first: Scalar = float(batch.first_steps) if batch.has_prev is None else 1 - torch.stack(batch.has_prev)
        batch.grad_weight = seen * (1 - first * (kappa / (1 - gamma)))
    elif batch.prev_grads is not None:
        before: Scalar = 1.0
        if batch.prev_coefficients is not None:
            before = batch.prev_coefficients[0]
            if any(coefficient is not before for coefficient in batch.prev_coefficients):
                before = torch.stack(batch.prev_coefficients)
            before = before.clamp(min=torch.finfo(before.dtype).tiny)
        kappa = kappa if batch.has_prev is None else kappa * torch.stack(batch.has_prev)
        batch.difference_weight = kappa * batch.sign * before
        batch.ratio = batch.coefficient / before


def _corrected_norm(batch: Batch, product: Tensor) -> Tensor:
    """||c_t|| of each tensor, shape (n,), from c = a g - b g'."""
    a, b = batch.grad_weight + batch.difference_weight * batch.ratio, batch.difference_weight
    if isinstance(batch.coefficient, Tensor):
        # s is 0 where squares of finite gradients overflow, as in clip_grad_norm_; then s g is 0, but 0 * inf is not.
        product = product.masked_fill(batch.coefficient == 0, 0)
    gg, go, oo = product.unbind(1)
    squared = a**2 * gg - 2 * a * b * go + b**2 * oo
    return squared.clamp(min=torch.finfo(squared.dtype).tiny).sqrt()  # tiny: a finite slope at 0


def clip_coefficient(total_norm: Tensor, max_norm: float) -> Tensor:
    """Return min(1, max_norm / (total_norm + 1e-6)), on the device."""
    return (max_norm / (total_norm + _NORM_EPS)).clamp(max=1.0)


def total_norm(
    batches: Sequence[Batch], products: Sequence[Tensor | None], replicas: Replicas, device: torch.device | None
) -> Tensor | None:
    """Return the 2-norm of all gradients in groups with a `max_grad_norm`; None without such groups.

    `replicas` may know only a part each; `device` is where ranks without any part begin, None without such groups.
    """
    squares = [
        product[:, 0].sum()
        for batch, product in zip(batches, products, strict=True)
        if product is not None and batch.treatment.max_grad_norm is not None
    ]
    if device is None or not (squares or replicas.shards_state):
        return None
    total = squares[0] if squares else torch.zeros((), dtype=torch.float64, device=device)
    for square in squares[1:]:
        total = total + square.to(total.device)
    return replicas.add_owners(total).sqrt()
