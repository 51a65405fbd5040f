"""The cross-entropy of an output head without its logits.

A suffix on a name gives its shape:
    N targets    C targets of one chunk    D width    V vocabulary
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def chunked_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk_size: int) -> Tensor:
    """Mean of `F.cross_entropy(F.linear(hidden, weight).float(), targets)`, `chunk_size` rows of logits at a time.

    The gradients are computed in the forward pass, where the logits are at hand: nothing is computed twice, and
    what is kept for the backward pass has the shapes of `hidden` and `weight`. Matrix products run in the precision of
    autocast, or of `hidden`; the loss and the sum of the weight's gradient are in fp32 (float64 stays float64).
    Call it inside the forward pass of the module that owns `weight`, so that wrappers have the weight in place.

    Reference: Hsu et al., 2024 (Liger kernels, fused linear cross-entropy).
    """
    device_type = hidden_ND.device.type
    is_autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if is_autocast else hidden_ND.dtype
    loss: Any = _ChunkedCrossEntropy.apply(hidden_ND, weight_VD, targets_N, chunk_size, dtype, torch.is_grad_enabled())
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        chunk_size: int,
        dtype: torch.dtype,
        needs_gradients: bool,
    ) -> Tensor:
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        inputs_ND, head_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
        loss = hidden_ND.new_zeros((), dtype=exact)
        hidden_grad_ND = torch.empty_like(inputs_ND) if needs_gradients else None
        weight_grad_VD = torch.zeros_like(weight_VD, dtype=exact) if needs_gradients else None
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for begin in range(0, len(targets_N), chunk_size):
                rows = slice(begin, begin + chunk_size)
                logits_CV = (inputs_ND[rows] @ head_VD.T).to(exact)
                log_norm_C1 = logits_CV.logsumexp(1, keepdim=True)
                loss += (log_norm_C1 - logits_CV.gather(1, targets_N[rows, None])).sum()
                if hidden_grad_ND is None or weight_grad_VD is None:
                    continue
                # softmax - one-hot, in the logits' place
                grad_CV = logits_CV.sub_(log_norm_C1).exp_()
                grad_CV.scatter_add_(1, targets_N[rows, None], grad_CV.new_full(log_norm_C1.shape, -1.0))
                grad_CV = grad_CV.to(dtype)
                hidden_grad_ND[rows] = grad_CV @ head_VD
                weight_grad_VD += grad_CV.T @ inputs_ND[rows]
        ctx.gradients = hidden_grad_ND, weight_grad_VD
        ctx.dtypes = hidden_ND.dtype, weight_VD.dtype
        ctx.count = len(targets_N)
        return loss / len(targets_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.gradients is None:
            raise RuntimeError("chunked_cross_entropy can be differentiated once; evaluate the loss again")
        hidden_grad_ND, weight_grad_VD = ctx.gradients
        ctx.gradients = None  # They are scaled in place: of the weight's, there should never be two.
        scale = grad / ctx.count
        hidden_grad_ND, weight_grad_VD = hidden_grad_ND.mul_(scale), weight_grad_VD.mul_(scale)
        return hidden_grad_ND.to(ctx.dtypes[0]), weight_grad_VD.to(ctx.dtypes[1]), None, None, None, None
