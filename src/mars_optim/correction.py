r"""The corrected gradient and its clipping, as weights of the gradient and of the gradient difference.

With kappa = gamma * beta1/(1-beta1), d = g - g', and s the factor of global clipping, the corrected gradient

    c  = s g + kappa (s g - g')  =  (s + kappa (s-1)) g + kappa d                       (3.5)
    c~ = c / max(1, ||c|| / clip_norm)                                                   (3.6)

needs only two numbers a tensor. Both norms come from the sums g.g, g.d and d.d, which shards of a tensor simply
add. In this basis little cancels: d is small where kappa is large (exact mode near gamma = 1).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .backends import Backend
from .batch import Batch, Scalar

# As in torch.nn.utils.clip_grad_norm_, whose result `max_grad_norm` must give.
_NORM_EPS = 1e-6


def weigh(batches: Sequence[Batch], backends: Sequence[Backend]) -> None:
    """Set the weights of every batch: gradient correction, global clipping, clipping of c_t. No host sync."""
    products = [
        backend.gradient_products(batch.grads, batch.prev_grads) if _needs_norms(batch) else None
        for batch, backend in zip(batches, backends, strict=True)
    ]
    total = _total_norm(batches, products)
    for batch, product in zip(batches, products, strict=True):
        kappa = _kappa(batch)
        if product is None:
            batch.diff_weight = list(kappa.unbind()) if isinstance(kappa, Tensor) and kappa.ndim else kappa
            continue
        if batch.treatment.max_grad_norm is not None and total is not None:
            batch.grad_coefficient = clip_coefficient(total, batch.treatment.max_grad_norm).to(product.device)
        s = batch.grad_coefficient
        grad_weight = (s + kappa * (s - 1)) * torch.ones_like(product[:, 0])
        diff_weight = kappa * torch.ones_like(grad_weight)
        if batch.treatment.clip_norm is not None:
            gg, gd, dd = product.unbind(1)
            squared = grad_weight**2 * gg + 2 * grad_weight * diff_weight * gd + diff_weight**2 * dd
            norm = squared.clamp(min=torch.finfo(squared.dtype).tiny).sqrt()  # tiny: a finite slope at 0
            clip = batch.treatment.clip_norm / norm.clamp(min=batch.treatment.clip_norm)
            grad_weight, diff_weight = clip * grad_weight, clip * diff_weight
        batch.grad_weight, batch.diff_weight = list(grad_weight.unbind()), list(diff_weight.unbind())


def clip_coefficient(total_norm: Tensor, max_norm: float) -> Tensor:
    """Return min(1, max_norm / (total_norm + 1e-6)), on the device."""
    return (max_norm / (total_norm + _NORM_EPS)).clamp(max=1.0)


def _needs_norms(batch: Batch) -> bool:
    return batch.treatment.clip_norm is not None or batch.treatment.max_grad_norm is not None


def _total_norm(batches: Sequence[Batch], products: Sequence[Tensor | None]) -> Tensor | None:
    """The 2-norm of all gradients in groups with a `max_grad_norm`."""
    squares = [
        product[:, 0].sum()
        for batch, product in zip(batches, products, strict=True)
        if product is not None and batch.treatment.max_grad_norm is not None
    ]
    if not squares:
        return None
    total = squares[0]
    for square in squares[1:]:
        total = total + square.to(total.device)
    return total.sqrt()


def _kappa(batch: Batch) -> Scalar:
    """gamma * beta1/(1-beta1), and 0 for a tensor that has no previous gradient; shape () or (n,)."""
    gamma = batch.treatment.gamma
    if gamma is None or batch.prev_grads is None:
        return 0.0
    beta1 = batch.treatment.beta1
    kappa = gamma * (beta1 / (1 - beta1))
    return kappa if batch.has_prev is None else kappa * torch.stack(batch.has_prev)
