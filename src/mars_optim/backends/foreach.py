"""The step over lists of tensors at once, with torch's `_foreach` functions."""
# pyright: reportPrivateImportUsage=false, reportPrivateUsage=false

from __future__ import annotations

import torch
from torch import Tensor

from mars_optim.batch import Batch

Tensors = list[Tensor] | tuple[Tensor, ...]


def gradient_products(batch: Batch) -> Tensor:
    """Return (g.g, g.o, o.o) for each tensor, o = g' under global clipping, else g - g': shape (n, 3)."""
    gg = torch.stack(torch._foreach_norm(batch.grads)) ** 2
    if batch.prev_grads is None:
        return torch.stack([gg, torch.zeros_like(gg), torch.zeros_like(gg)], dim=1)
    others: Tensors = batch.prev_grads
    if not batch.is_clipped_globally:
        others = torch._foreach_sub(batch.grads, batch.prev_grads)
    oo = torch.stack(torch._foreach_norm(others)) ** 2
    go = torch.stack([product.sum() for product in torch._foreach_mul(batch.grads, others)])
    return torch.stack([gg, go, oo], dim=1)


def moments_(batch: Batch) -> None:
    """m_t = beta1 m_{t-1} + (1-beta1) c~_t and v_t = beta2 v_{t-1} + (1-beta2) c~_t^2; keep g_t where asked."""
    beta1, beta2 = batch.treatment.beta1, batch.treatment.beta2
    grads: Tensors = batch.grads
    if not _is_one(batch.grad_coefficient):
        grads = torch._foreach_mul(grads, batch.grad_coefficient)
    c = grads
    if batch.prev_grads is not None:
        c = torch._foreach_sub(grads, batch.prev_grads)
        torch._foreach_mul_(c, batch.kappa)
        torch._foreach_add_(c, grads)
    if not _is_one(batch.clip):
        c = torch._foreach_mul(c, batch.clip)
    torch._foreach_lerp_(batch.state["exp_avg"], c, 1 - beta1)
    if "exp_avg_sq" in batch.state:
        torch._foreach_mul_(batch.state["exp_avg_sq"], beta2)
        torch._foreach_addcmul_(batch.state["exp_avg_sq"], c, c, 1 - beta2)
    if batch.next_grads is not None:
        torch._foreach_copy_(batch.next_grads, grads)


def descend_(batch: Batch, directions: Tensors, scales: list[float]) -> None:
    """x_{t+1} = x_t - lr (scale * direction + weight_decay * x_t); overwrites `directions`."""
    lr, weight_decay = batch.treatment.lr, batch.treatment.weight_decay
    x = [p.to(d.dtype) for p, d in zip(batch.params, directions, strict=True)] if batch.is_half else batch.params
    if weight_decay != 0:
        torch._foreach_mul_(x, 1 - lr * weight_decay)
    if any(scale != 1 for scale in scales):
        torch._foreach_mul_(directions, scales)
    torch._foreach_mul_(directions, lr)
    torch._foreach_sub_(x, directions)
    if batch.is_half:
        torch._foreach_copy_(batch.params, x)


def adamw_(batch: Batch) -> None:
    """m^_t / (sqrt(v^_t) + eps), both moments bias corrected."""
    moments_(batch)
    treatment = batch.treatment
    v = batch.state["exp_avg_sq"]
    if treatment.amsgrad:
        torch._foreach_maximum_(batch.state["max_exp_avg_sq"], v)
        v = batch.state["max_exp_avg_sq"]
    denominators = torch._foreach_sqrt(v)
    torch._foreach_mul_(denominators, [(1 - treatment.beta2**t) ** -0.5 for t in batch.steps])
    torch._foreach_add_(denominators, treatment.eps)
    torch._foreach_mul_(denominators, [1 - treatment.beta1**t for t in batch.steps])
    directions = torch._foreach_div(batch.state["exp_avg"], denominators)
    descend_(batch, directions, batch.update_scales)


def lion_(batch: Batch) -> None:
    """sign(m_t)."""
    moments_(batch)
    descend_(batch, torch._foreach_sign(batch.state["exp_avg"]), batch.update_scales)


def _is_one(weight: object) -> bool:
    return isinstance(weight, float) and weight == 1.0
