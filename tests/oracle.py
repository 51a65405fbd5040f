"""MARS in float64, one tensor at a time, written from SPEC section 1 and from nothing else.

    d_t  = g_t - g'_t                                   gradient difference
    c_t  = g_t + gamma_t * beta1/(1-beta1) * d_t        corrected gradient
    c~_t = c_t / max(1, ||c_t|| / clip_norm)            clipped, tensor by tensor
    m_t  = beta1 * m_{t-1} + (1-beta1) * c~_t           momentum
    x_{t+1} = x_t - lr_t * (H_t^{-1} m_t + weight_decay * x_t)

The library is not imported here and shares no line with this file. Gradients are handed in, so the caller
decides which function is minimised: `Oracle.step(grads)` in approx mode; in exact mode
`Oracle.step(grads, previous_grads)`, the second list taken at `Oracle.previous_weights()`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TYPES = {  # mars_type -> (preconditioner, update scale)
    "adamw": ("adamw", "none"),
    "lion": ("lion", "none"),
    "shampoo": ("polar", "spectral"),
    "m": ("polar", "rms"),
}


@dataclass(frozen=True)
class Settings:
    """The hyperparameters of one group, with the constructor's defaults."""

    lr: float = 3e-3
    betas: tuple[float, float] = (0.95, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False
    gamma: float | Callable[[int], float] = 0.025
    is_approx: bool = True
    mars_type: str = "adamw"
    optimize_1d: bool = False
    lr_1d: float | None = None
    betas_1d: tuple[float, float] = (0.9, 0.95)
    weight_decay_1d: float | None = None
    clip_norm: float | None = 1.0
    first_step: str = "paper"
    max_grad_norm: float | None = None
    preconditioner: str | None = None
    update_scale: str | None = None
    matrix_view: Any = "flatten"
    matrix_transposed: bool = False
    maximize: bool = False


@dataclass
class TensorState:
    """What the algorithm remembers about one tensor."""

    m: Tensor
    v: Tensor
    v_max: Tensor
    t: int = 0
    previous_gradient: Tensor | None = None  # g_{t-1}, approx
    previous_weight: Tensor | None = None  # x_{t-1}, exact


def real(tensor: Tensor) -> Tensor:
    """A float64 copy; a complex number is a pair of real ones."""
    tensor = tensor.detach()
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).to(torch.float64).clone()


def polar(M: Tensor) -> Tensor:
    """U V^T over the nonzero singular values; polar(0) = 0. Batched over leading dimensions."""
    if M.numel() == 0:
        return M.clone()
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    largest = S.amax(dim=-1, keepdim=True)
    nonzero = largest * max(M.shape[-2:]) * torch.finfo(M.dtype).eps < S
    return (U * nonzero.unsqueeze(-2)) @ Vh


def scaled_polar(M: Tensor, update_scale: str, transposed: bool) -> Tensor:
    rows, cols = M.shape[-2:]
    if transposed:
        rows, cols = cols, rows
    if M.numel() == 0 or update_scale == "none":
        scale = 1.0
    elif update_scale == "spectral":
        scale = math.sqrt(max(1.0, rows / cols))
    else:
        scale = 0.2 * math.sqrt(max(rows, cols))
    return scale * polar(M)


def polar_update(m: Tensor, settings: Settings, update_scale: str) -> Tensor:
    """The polar factor of each matrix that the view sees in m, back in m's shape."""
    view, transposed = settings.matrix_view, settings.matrix_transposed
    if view == "stack":
        return scaled_polar(m, update_scale, transposed)
    if view == "flatten":
        rows = m.shape[0]
        matrix = m.reshape(rows, math.prod(m.shape[1:]))
        return scaled_polar(matrix, update_scale, transposed).reshape(m.shape)
    _, dim, sizes = view
    pieces = torch.split(m, list(sizes), dim=dim)
    return torch.cat([scaled_polar(piece, update_scale, transposed) for piece in pieces], dim=dim)


def global_clip(grads: list[Tensor | None], max_norm: float) -> list[Tensor | None]:
    """What torch.nn.utils.clip_grad_norm_ does to all gradients of one evaluation."""
    total = math.sqrt(sum(float((g * g).sum()) for g in grads if g is not None))
    coefficient = min(1.0, max_norm / (total + 1e-6))
    return [None if g is None else g * coefficient for g in grads]


class Oracle:
    """The weights `x` and the state of every tensor; `settings` may differ from tensor to tensor."""

    def __init__(
        self, tensors: Sequence[Tensor], settings: Settings | Sequence[Settings] | None = None, **overrides: Any
    ):
        self.x = [real(tensor) for tensor in tensors]
        self.is_1d = [tensor.ndim < 2 for tensor in tensors]
        if isinstance(settings, Sequence):
            self.settings = list(settings)
        else:
            self.settings = [settings or Settings(**overrides)] * len(self.x)
        self.state = [TensorState(torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(x)) for x in self.x]

    def previous_weights(self) -> list[Tensor]:
        """x_{t-1}, where exact mode evaluates the minibatch a second time."""
        return [
            x.clone() if s.previous_weight is None else s.previous_weight.clone()
            for x, s in zip(self.x, self.state, strict=True)
        ]

    def step(
        self,
        grads: Sequence[Tensor | None],
        previous_grads: Sequence[Tensor | None] | None = None,
        lr: float | None = None,
    ) -> None:
        g = [None if grad is None else real(grad) for grad in grads]
        g_prime = [None if grad is None else real(grad) for grad in previous_grads or [None] * len(g)]
        max_norm = self.settings[0].max_grad_norm
        if max_norm is not None:
            g, g_prime = global_clip(g, max_norm), global_clip(g_prime, max_norm)
        for i, gradient in enumerate(g):
            self.state[i].previous_weight = self.x[i]  # x_{t-1} is one point: also where nothing moves now
            if gradient is not None:
                self._step_one(i, gradient, g_prime[i], lr)

    def _step_one(self, i: int, g: Tensor, g_prime: Tensor | None, lr: float | None) -> None:
        p, x, state = self.settings[i], self.x[i], self.state[i]
        preconditioner, update_scale = TYPES[p.mars_type]
        preconditioner = p.preconditioner or preconditioner
        update_scale = p.update_scale or update_scale
        beta1, beta2 = p.betas
        rate = p.lr if lr is None else lr
        weight_decay, clip_norm = p.weight_decay, p.clip_norm
        gamma = p.gamma(state.t) if callable(p.gamma) else float(p.gamma)
        if self.is_1d[i]:
            if not p.optimize_1d:
                preconditioner, gamma, clip_norm = "adamw", 0.0, None
                beta1, beta2 = p.betas_1d
                rate *= 1.0 if p.lr_1d is None else p.lr_1d / p.lr
                weight_decay = p.weight_decay if p.weight_decay_1d is None else p.weight_decay_1d
            elif preconditioner == "polar":
                preconditioner = "adamw"
        if p.maximize:
            g = -g
            g_prime = None if g_prime is None else -g_prime

        c = g + gamma * beta1 / (1 - beta1) * (g - self._other_gradient(state, p, g, g_prime))
        if clip_norm is not None:
            c = c / max(1.0, float(torch.linalg.vector_norm(c)) / clip_norm)
        state.t += 1
        state.m = beta1 * state.m + (1 - beta1) * c
        if preconditioner == "adamw":
            state.v = beta2 * state.v + (1 - beta2) * c * c
            state.v_max = torch.maximum(state.v_max, state.v)
            v = state.v_max if p.amsgrad else state.v
            m_hat, v_hat = state.m / (1 - beta1**state.t), v / (1 - beta2**state.t)
            update = m_hat / (v_hat.sqrt() + p.eps)
        elif preconditioner == "lion":
            update = torch.sign(state.m)
        else:
            update = polar_update(state.m, p, update_scale)
        state.previous_gradient = -g if p.maximize else g
        self.x[i] = x - rate * (update + weight_decay * x)

    def _other_gradient(self, state: TensorState, p: Settings, g: Tensor, g_prime: Tensor | None) -> Tensor:
        """g'_t. On a tensor's first step: g_t itself ("paper", so d_1 = 0) or zero ("zero")."""
        if state.t == 0:
            return g if p.first_step == "paper" else torch.zeros_like(g)
        if p.is_approx:
            assert state.previous_gradient is not None
            return -state.previous_gradient if p.maximize else state.previous_gradient
        return torch.zeros_like(g) if g_prime is None else g_prime
