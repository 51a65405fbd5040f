"""The polar factor of a matrix's leading part, found by random projection."""
# torch.linalg is not typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_OVERSAMPLING = 8
_POWER_STEPS = 2


class Sketch(NamedTuple):
    """A polar factor of low rank and what it leaves out.

    Attributes:
        factor: shape (..., rows, columns), `rank` singular values 1, the rest 0.
        residual: shape (...), ||M - Q Q^T M||_F / ||M||_F for the subspace Q that was searched: the part of M which the
            factor ignores. The best subspace of the same size has the root of the sum of the remaining sigma^2.
    """

    factor: Tensor
    residual: Tensor


def sketched(x: Tensor, rank: int) -> Sketch:
    """Return U_r V_r^T of the `rank` leading singular directions of `x`, shape (count, rows, columns).

    A subspace Q of `rank` + 8 dimensions is found by two steps of subspace iteration on a Gaussian matrix (from a
    fixed seed: the same input has the same factor, on every rank and after a restart), then M is replaced by Q Q^T M
    and that factorised exactly.

    Reference: Halko, Martinsson, Tropp, "Finding structure with randomness" (2011), algorithm 4.4.
    """
    rows, columns = x.shape[-2:]
    size = min(rank + _OVERSAMPLING, rows, columns)
    generator = torch.Generator(device="cpu").manual_seed(0)
    start = torch.randn(columns, size, generator=generator, dtype=torch.float64).to(x)
    basis, _ = torch.linalg.qr(x @ start)
    for _ in range(_POWER_STEPS):
        other, _ = torch.linalg.qr(x.mT @ basis)
        basis, _ = torch.linalg.qr(x @ other)
    small = basis.mT @ x
    u, sigma, vh = torch.linalg.svd(small, full_matrices=False)
    cutoff = torch.finfo(x.dtype).eps * max(rows, columns) * sigma[..., :1]
    kept = (sigma > cutoff) & (torch.arange(size, device=x.device) < rank)
    factor = basis @ ((u * kept.to(x.dtype).unsqueeze(-2)) @ vh)
    norm = torch.linalg.matrix_norm(x)
    residual = torch.linalg.matrix_norm(x - basis @ small) / torch.where(norm == 0, torch.ones_like(norm), norm)
    return Sketch(factor, residual)
