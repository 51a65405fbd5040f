"""Polar factors by dense factorisations: SVD, Newton's iteration, QDWH. Accurate to rounding, in fp32 or float64."""
# torch.linalg is not typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math

import torch
from torch import Tensor

_MAX_NEWTON_STEPS = 30  # 9 or 10 are enough with scaling; a singular matrix never gets there


def by_svd(x: Tensor) -> Tensor:
    """Return U V^T over the singular values above eps * max(rows, columns) of the largest; shape (count, n, m)."""
    u, sigma, vh = torch.linalg.svd(x, full_matrices=False)
    # The factor is unique only on the range: directions of zero singular value are left out, not invented.
    cutoff = torch.finfo(x.dtype).eps * max(x.shape[-2:]) * sigma[..., :1]
    return (u * (sigma > cutoff).to(x.dtype).unsqueeze(-2)) @ vh


def by_newton(x: Tensor) -> Tensor:
    r"""Return the limit of X <- (z X + X^{-T} / z) / 2 with Higham's scaling z, x of shape (count, n, m), n <= m.

    .. math:: z^4 = \|X^{-1}\|_1 \|X^{-1}\|_\infty / (\|X\|_1 \|X\|_\infty).

    A rectangular X is first reduced to its triangular factor. Matrices that are singular to working precision have no
    inverse and are left to QDWH.

    Reference: Higham, "Computing the polar decomposition, with applications" (1986).
    """
    basis, square = _reduced(x)
    result = square
    tolerance = square.shape[-1] * torch.finfo(x.dtype).eps
    for _ in range(_MAX_NEWTON_STEPS):
        # One by one: batches of LU factorisations on several threads are wrong, or raise (pytorch/pytorch#142815).
        inverse = torch.stack([torch.linalg.inv_ex(matrix)[0] for matrix in result])
        z = (_norms(inverse) / _norms(result)).sqrt().sqrt()
        new = (z * result + inverse.mT / z) / 2
        change = torch.linalg.matrix_norm(new - result)
        result = new
        if not bool((change > tolerance * torch.linalg.matrix_norm(new)).any()):
            break
    identity = torch.eye(square.shape[-1], dtype=x.dtype, device=x.device)
    # Convergence is checked, not believed: with a singular matrix the inverse is inf, or a large random matrix.
    defect = torch.linalg.matrix_norm(result @ result.mT - identity)
    failed = ~(defect <= 100 * tolerance)
    if bool(failed.any()):
        result[failed] = _qdwh(square[failed])
    return result if basis is None else result @ basis.mT


def by_qdwh(x: Tensor) -> Tensor:
    r"""Return the limit of the dynamically weighted Halley iteration, x of shape (count, n, m), n <= m.

    .. math:: X \leftarrow X (a I + b X^\top X) (I + c X^\top X)^{-1}

    with weights that are optimal for singular values in [l, 1], and l followed from eps on. It converges for every
    matrix in at most 6 steps in float64; the first ones use QR, which is backward stable, and once c < 100 Cholesky.

    Reference: Nakatsukasa, Bai, Gygi, "Optimizing Halley's iteration for computing the matrix polar decomposition"
    (2010).
    """
    basis, square = _reduced(x)
    result = _qdwh(square)
    return result if basis is None else result @ basis.mT


def _qdwh(x: Tensor) -> Tensor:
    eps = torch.finfo(x.dtype).eps
    x = x / torch.linalg.matrix_norm(x).clamp(min=torch.finfo(x.dtype).tiny)[..., None, None]
    identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).expand_as(x)
    low = eps
    while 1 - low > 10 * eps:
        d = (4 * (1 - low**2) / low**4) ** (1 / 3)
        a = math.sqrt(1 + d) + math.sqrt(8 - 4 * d + 8 * (2 - low**2) / (low**2 * math.sqrt(1 + d))) / 2
        b = (a - 1) ** 2 / 4
        c = a + b - 1
        if c > 100:
            q, _ = torch.linalg.qr(torch.cat([math.sqrt(c) * x, identity], dim=-2))
            top, bottom = q.split(x.shape[-2], dim=-2)
            x = (b / c) * x + ((a - b / c) / math.sqrt(c)) * (top @ bottom.mT)
        else:
            factor, _ = torch.linalg.cholesky_ex(identity + c * (x.mT @ x))
            x = (b / c) * x + (a - b / c) * torch.cholesky_solve(x.mT, factor).mT
        low = min(1.0, low * (a + b * low**2) / (1 + c * low**2))
    return x


def _reduced(x: Tensor) -> tuple[Tensor | None, Tensor]:
    """Return (Q, R^T) with x^T = Q R, or (None, x) for a square x: polar(x) = polar(R^T) Q^T."""
    if x.shape[-2] == x.shape[-1]:
        return None, x
    q, r = torch.linalg.qr(x.mT)
    return q, r.mT


def _norms(x: Tensor) -> Tensor:
    """Return |x|_1 |x|_inf of each matrix, shape (count, 1, 1)."""
    one = torch.linalg.matrix_norm(x, 1)
    return (one * torch.linalg.matrix_norm(x, math.inf))[..., None, None]
