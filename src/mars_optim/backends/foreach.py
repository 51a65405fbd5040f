"""The step over lists of tensors at once, with torch's `_foreach` functions."""
# pyright: reportPrivateImportUsage=false, reportPrivateUsage=false

from __future__ import annotations

import torch
from torch import Tensor

from mars_optim.batch import Batch, Scalar, Weight

from .reference import gradient_products

__all__ = [
    "adamw_",
    "bounds_clip",
    "descend_",
    "gradient_products",
    "lion_",
    "measures_clip",
    "momentum_",
    "reads_storage",
    "unscales",
]

Tensors = list[Tensor] | tuple[Tensor, ...]
reads_storage = False
unscales = False
measures_clip = False
bounds_clip = False


def momentum_(batch: Batch) -> list[Tensor]:
    """m_t = beta1 m_{t-1} + (1-beta1) c~_t and v_t = beta2 v_{t-1} + (1-beta2) c~_t^2; return m_t."""
    beta1, beta2 = batch.treatment.beta1, batch.treatment.beta2
    m = batch.state[batch.momentum_name]
    c: Tensors = batch.grads
    if not _is_one(batch.grad_weight):
        c = torch._foreach_mul(c, _each(batch.grad_weight))
    if batch.prev_grads is not None:
        scaled: Tensors = batch.grads if _is_one(batch.ratio) else torch._foreach_mul(batch.grads, _each(batch.ratio))
        differences = torch._foreach_sub(scaled, batch.prev_grads)
        torch._foreach_mul_(differences, _each(batch.difference_weight))
        torch._foreach_add_(differences, c)
        c = differences
    assert batch.clip is not None
    if not _is_one(batch.clip):
        c = torch._foreach_mul(c, _each(batch.clip))
    torch._foreach_lerp_(m, c, 1 - beta1)
    if "exp_avg_sq" in batch.state:
        torch._foreach_mul_(batch.state["exp_avg_sq"], beta2)
        torch._foreach_addcmul_(batch.state["exp_avg_sq"], c, c, 1 - beta2)
    if not batch.treatment.one_buffer:
        return m
    average_weight, grad_weight = batch.momentum_weights
    blend = torch._foreach_mul(m, average_weight)
    torch._foreach_add_(blend, torch._foreach_mul(batch.grads, grad_weight))
    return list(blend)


def descend_(batch: Batch, directions: Tensors, scales: list[float]) -> None:
    """x_{t+1} = x_t - lr (scale * direction + weight_decay * x_t); overwrites `directions`."""
    lr, weight_decay = batch.treatment.lr, batch.treatment.weight_decay
    if weight_decay != 0:
        torch._foreach_mul_(batch.params, 1 - lr * weight_decay)
    if any(scale != 1 for scale in scales):
        torch._foreach_mul_(directions, scales)
    torch._foreach_mul_(directions, lr)
    torch._foreach_sub_(batch.params, directions)


def adamw_(batch: Batch) -> None:
    """m^_t / (sqrt(v^_t) + eps), both moments bias corrected."""
    m, treatment = momentum_(batch), batch.treatment
    v = batch.state["exp_avg_sq"]
    if treatment.amsgrad:
        torch._foreach_maximum_(batch.state["max_exp_avg_sq"], v)
        v = batch.state["max_exp_avg_sq"]
    denominators = torch._foreach_sqrt(v)
    torch._foreach_mul_(denominators, [(1 - treatment.beta2**t) ** -0.5 for t in batch.steps])
    torch._foreach_add_(denominators, treatment.eps)
    torch._foreach_mul_(denominators, [1 - treatment.beta1**t for t in batch.steps])
    descend_(batch, torch._foreach_div(m, denominators), batch.update_scales)


def lion_(batch: Batch) -> None:
    """sign(m_t)."""
    descend_(batch, torch._foreach_sign(momentum_(batch)), batch.update_scales)


def _each(weight: Weight) -> Scalar | list[Tensor]:
    return list(weight.unbind()) if isinstance(weight, Tensor) and weight.ndim else weight


def _is_one(weight: object) -> bool:
    return isinstance(weight, float) and weight == 1.0
