"""Shampoo as published, with the preconditioners that it accumulates: one for each dimension of a tensor.

For a tensor of order k (dimensions of size 1 don't count) with gradient G_t, where mat_i(G) is the matrix whose rows
are the slices of G along dimension i, and x_i multiplies along dimension i:

    H_i,t  = H_i,t-1 + mat_i(G_t) mat_i(G_t)^T,   H_i,0 = eps I
    M_t    = momentum M_{t-1} + (1 - momentum) G_t,   M_0 = 0
    X_t+1  = X_t - lr (M_t x_1 H_1,t^(-1/2k) ... x_k H_k,t^(-1/2k) + weight_decay X_t)

The inverse roots are computed at each of the first `interval` steps, in which H grows manifold, then at every
`interval`-th, from eigenvalues in float64. Of a dimension larger than `max_size`, the diagonal of H alone is kept.

References: Gupta, Koren and Singer, 2018, arXiv:1802.09568: Algorithm 2; momentum 0.9, roots every 20 to 100 steps and
diagonals above a size of about 1200 are those of their experiments, eps that of their code. The decay is decoupled as
in AdamW; theirs has none.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mars_lab.errors import DivergenceError


class Shampoo(torch.optim.Optimizer):
    """Shampoo for tensors of any order; see the module for what it computes.

    Args:
        params: fp32 or float64 tensors, or groups of them.
        lr: learning rate.
        momentum: decay of the running average of gradients, in [0, 1).
        eps: what every preconditioner begins with on its diagonal, above 0.
        weight_decay: decoupled, as a multiple of lr.
        interval: steps between computations of the inverse roots, after as many with one each.
        max_size: largest dimension with a whole matrix for a preconditioner.

    Raises:
        ValueError: a hyperparameter is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        *,
        momentum: float = 0.9,
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        interval: int = 20,
        max_size: int = 1200,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if not eps > 0:
            raise ValueError(f"eps must be above 0, got {eps}; without it the first preconditioners have no inverse")
        for name, value in (("interval", interval), ("max_size", max_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        defaults = {"lr": lr, "momentum": momentum, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "interval": interval, "max_size": max_size})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step.

        Raises:
            DivergenceError: a preconditioner is not finite.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        shape = [size for size in parameter.shape if size > 1] or [1]
        state = self.state[parameter]
        if not state:
            _begin(state, parameter, shape, group["max_size"])
        # Contiguous as what a checkpoint gives back: sums in another order would differ in the last bits.
        grad = parameter.grad.reshape(shape).contiguous()  # pyright: ignore[reportOptionalMemberAccess]
        direction = state["exp_avg"].lerp_(grad, 1 - group["momentum"])
        state["step"] += 1
        step, interval = int(state["step"].item()), group["interval"]
        is_due = step <= interval or step % interval == 0
        for dim in range(len(shape)):
            statistics, root = state[f"preconditioner_{dim}"], state[f"inverse_root_{dim}"]
            rows = grad.movedim(dim, 0).flatten(1) if len(shape) > 1 else grad[:, None]
            statistics += rows @ rows.T if statistics.dim() == 2 else rows.square().sum(1)
            if is_due:
                root.copy_(inverse_root(statistics, 2 * len(shape), group["eps"]))
            direction = _along(direction, root, dim)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(direction.reshape(parameter.shape), alpha=-group["lr"])


def inverse_root(statistics: Tensor, order: int, eps: float) -> Tensor:
    """(S + eps I)^(-1/order) of a positive semidefinite S, or of the diagonal matrix that the vector S stands for.

    Raises:
        DivergenceError: S is not finite.
    """
    wide = statistics.double()
    if not bool(wide.isfinite().all()):
        raise DivergenceError(
            "a preconditioner of Shampoo is not finite: its gradients were not, or too large. Try a lower "
            "--optimizer.lr or a larger --train.warmup-fraction"
        )
    if wide.dim() == 1:
        return (wide + eps).pow(-1 / order).to(statistics.dtype)
    values, vectors = torch.linalg.eigh(wide)
    powers = values.clamp(min=0).add(eps).pow(-1 / order)  # rounding makes small eigenvalues negative
    return (vectors * powers @ vectors.T).to(statistics.dtype)


def _begin(state: dict[str, Any], parameter: Tensor, shape: list[int], max_size: int) -> None:
    state["step"] = torch.zeros(())
    state["exp_avg"] = parameter.new_zeros(shape)
    for dim, size in enumerate(shape):
        for name in ("preconditioner", "inverse_root"):
            state[f"{name}_{dim}"] = parameter.new_zeros((size, size) if size <= max_size else (size,))


def _along(tensor: Tensor, root: Tensor, dim: int) -> Tensor:
    """`tensor` with its dimension `dim` multiplied by a symmetric matrix, or by the diagonal one that a vector is."""
    if root.dim() == 2:
        return (tensor.movedim(dim, -1) @ root).movedim(-1, dim)
    return tensor * root.reshape([-1 if other == dim else 1 for other in range(tensor.dim())])
