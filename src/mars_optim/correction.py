r"""The corrected gradient and its clipping, as two numbers a tensor.

With kappa = gamma * beta1/(1-beta1) and s the factor of global clipping,

    c  = s g + kappa (s g - g')                                                          (3.5)
    c~ = c / max(1, ||c|| / clip_norm)                                                   (3.6)

||c|| follows from three sums a tensor before s is known, so that one pass and one reduction serve both norms.
Without global clipping they are g.g, g.d and d.d with d = g - g': little cancels then, also where kappa is large and
d small (exact mode near gamma = 1). With it they are g.g, g.g' and g'.g': g' has been clipped and g has not, so d
would say nothing.
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
    """Set s, kappa and the clip factor of every batch from the gradients' norms. No host sync."""
    products = [
        backend.gradient_products(batch) if _needs_norms(batch) else None
        for batch, backend in zip(batches, backends, strict=True)
    ]
    total = _total_norm(batches, products)
    for batch, product in zip(batches, products, strict=True):
        kappa = _kappa(batch)
        batch.kappa = list(kappa.unbind()) if isinstance(kappa, Tensor) and kappa.ndim else kappa
        if product is None:
            continue
        if batch.treatment.max_grad_norm is not None and total is not None:
            batch.grad_coefficient = clip_coefficient(total, batch.treatment.max_grad_norm).to(product.device)
        if batch.treatment.clip_norm is not None:
            norm = _corrected_norm(batch, product, kappa)
            batch.clip = list((batch.treatment.clip_norm / norm.clamp(min=batch.treatment.clip_norm)).unbind())


def _corrected_norm(batch: Batch, product: Tensor, kappa: Scalar) -> Tensor:
    """||c_t|| of each tensor, shape (n,), from c = a g + b o."""
    gg, go, oo = product.unbind(1)
    if batch.is_clipped_globally:
        a, b = batch.grad_coefficient * (1 + kappa), -kappa
        # s is 0 where squares of finite gradients overflow, as in clip_grad_norm_; then s g is 0, but 0 * inf is not.
        vanished = torch.as_tensor(batch.grad_coefficient == 0)
        gg, go = gg.masked_fill(vanished, 0), go.masked_fill(vanished, 0)
    else:
        a, b = 1.0, kappa
    squared = a**2 * gg + 2 * a * b * go + b**2 * oo
    return squared.clamp(min=torch.finfo(squared.dtype).tiny).sqrt()  # tiny: a finite slope at 0


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
