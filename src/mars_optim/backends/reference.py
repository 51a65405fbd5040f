"""The step as the paper writes it, one tensor at a time. Differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from mars_optim.batch import Batch, Scalar, Weight


def gradient_products(batch: Batch) -> Tensor:
    """Return (g.g, g.o, o.o) for each tensor, o = g' under global clipping, else g - g': shape (n, 3)."""
    rows: list[Tensor] = []
    for i, g in enumerate(batch.grads):
        if batch.prev_grads is None:
            zero = g.new_zeros(())
            rows.append(torch.stack([(g * g).sum(), zero, zero]))
        else:
            other = batch.prev_grads[i] if batch.is_clipped_globally else g - batch.prev_grads[i]
            rows.append(torch.stack([(g * g).sum(), (g * other).sum(), (other * other).sum()]))
    return torch.stack(rows)


def moments_(batch: Batch) -> None:
    """m_t = beta1 m_{t-1} + (1-beta1) c~_t and v_t = beta2 v_{t-1} + (1-beta2) c~_t^2; keep g_t where asked."""
    beta1, beta2 = batch.treatment.beta1, batch.treatment.beta2
    v = batch.state.get("exp_avg_sq")
    for i, (g, m) in enumerate(zip(batch.grads, batch.state["exp_avg"], strict=True)):
        g = g * batch.grad_coefficient
        c = g
        if batch.prev_grads is not None:
            c = g + (g - batch.prev_grads[i]) * _at(batch.kappa, i)
        c = c * _at(batch.clip, i)
        m.mul_(beta1).add_(c * (1 - beta1))
        if v is not None:
            v[i].mul_(beta2).add_(c * c * (1 - beta2))
        if batch.next_grads is not None:
            batch.next_grads[i].copy_(g)


def descend_(batch: Batch, directions: list[Tensor], scales: list[float]) -> None:
    """x_{t+1} = x_t - lr (scale * direction + weight_decay * x_t)."""
    lr, weight_decay = batch.treatment.lr, batch.treatment.weight_decay
    for p, direction, scale in zip(batch.params, directions, scales, strict=True):
        x = p.to(direction.dtype)
        x.mul_(1 - lr * weight_decay).sub_(direction * (lr * scale))
        if x is not p:
            p.copy_(x)


def adamw_(batch: Batch) -> None:
    """m^_t / (sqrt(v^_t) + eps), both moments bias corrected."""
    moments_(batch)
    treatment = batch.treatment
    directions: list[Tensor] = []
    for i, (m, v, t) in enumerate(zip(batch.state["exp_avg"], batch.state["exp_avg_sq"], batch.steps, strict=True)):
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
    moments_(batch)
    descend_(batch, [m.sign() for m in batch.state["exp_avg"]], batch.update_scales)


def _at(weight: Weight, i: int) -> Scalar:
    return weight if isinstance(weight, (int, float, Tensor)) else weight[i]
