"""The step as the paper writes it, one tensor at a time. Differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from mars_optim.batch import Batch, Scalar, Weight

reads_storage = False
unscales = False
measures_clip = False
bounds_clip = False


def gradient_products(batch: Batch) -> Tensor:
    """Return (g.g, g.g', g'.g') for each tensor in float64, shape (n, 3)."""
    rows: list[Tensor] = []
    for i, g in enumerate(batch.grads):
        g = g.to(products_dtype(g))
        other = torch.zeros_like(g) if batch.prev_grads is None else batch.prev_grads[i].to(g.dtype)
        rows.append(torch.stack([(g * g).sum(), (g * other).sum(), (other * other).sum()]))
    return torch.stack(rows)


def momentum_(batch: Batch) -> list[Tensor]:
    """m_t = beta1 m_{t-1} + (1-beta1) c~_t and v_t = beta2 v_{t-1} + (1-beta2) c~_t^2; return m_t."""
    beta1, beta2 = batch.treatment.beta1, batch.treatment.beta2
    v = batch.state.get("exp_avg_sq")
    result: list[Tensor] = []
    for i, (g, m) in enumerate(zip(batch.grads, batch.state[batch.momentum_name], strict=True)):
        c = g * _at(batch.grad_weight, i)
        if batch.prev_grads is not None:
            c = c + (g * _at(batch.ratio, i) - batch.prev_grads[i]) * _at(batch.difference_weight, i)
        assert batch.clip is not None
        c = c * _at(batch.clip, i)
        m.mul_(beta1).add_(c * (1 - beta1))
        if v is not None:
            v[i].mul_(beta2).add_(c * c * (1 - beta2))
        if batch.treatment.one_buffer:
            average_weight, grad_weight = batch.momentum_weights
            m = m * average_weight + g * grad_weight
        result.append(m)
    return result


def descend_(batch: Batch, directions: list[Tensor], scales: list[float]) -> None:
    """x_{t+1} = x_t - lr (scale * direction + weight_decay * x_t)."""
    lr, weight_decay = batch.treatment.lr, batch.treatment.weight_decay
    for x, direction, scale in zip(batch.params, directions, scales, strict=True):
        x.mul_(1 - lr * weight_decay).sub_(direction * (lr * scale))


def adamw_(batch: Batch) -> None:
    """m^_t / (sqrt(v^_t) + eps), both moments bias corrected."""
    treatment = batch.treatment
    directions: list[Tensor] = []
    for i, (m, v, t) in enumerate(zip(momentum_(batch), batch.state["exp_avg_sq"], batch.steps, strict=True)):
        bias_correction1 = 1 - treatment.beta1**t
        bias_correction2 = 1 - treatment.beta2**t
        if treatment.amsgrad:
            largest = batch.state["max_exp_avg_sq"][i]
            largest.copy_(torch.maximum(largest, v))
            v = largest
        directions.append(m / bias_correction1 / (v.sqrt() / bias_correction2**0.5 + treatment.eps))
    descend_(batch, directions, batch.update_scales)


def lion_(batch: Batch) -> None:
    """sign(m_t)."""
    descend_(batch, [m.sign() for m in momentum_(batch)], batch.update_scales)


def products_dtype(tensor: Tensor) -> torch.dtype:
    """Return float64, in which sums of products lose nothing that matters, or what the device has instead."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _at(weight: Weight, i: int) -> Scalar:
    return weight[i] if isinstance(weight, Tensor) and weight.ndim else weight
