"""The polar factor U V^T of a matrix M = U S V^T, by Newton-Schulz iteration or by SVD."""
# torch.linalg is not typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .coefficients import Triple, triples

METHODS = ("newton-schulz", "svd")
DTYPES = (None, torch.float64, torch.float32, torch.bfloat16, torch.float16)
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class PolarMethod:
    """How polar factors are computed: method, polynomials, number of steps, arithmetic (`None`: by device)."""

    method: str = "newton-schulz"
    coefficients: str = "polar-express"
    steps: int = 6
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"polar_method must be one of {', '.join(METHODS)}; got {self.method!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"polar_dtype must be None or a real floating-point dtype; got {self.dtype!r}")
        triples(self.coefficients, self.steps, half_precision=False)

    def arithmetic(self, matrix: Tensor) -> torch.dtype:
        """Return the dtype to iterate in: the given one, else bfloat16 on an accelerator and fp32 on the CPU."""
        if self.dtype is not None:
            return self.dtype
        if matrix.dtype == torch.float64 or (self.method == "svd" and matrix.dtype == torch.float32):
            return matrix.dtype
        if self.method == "svd" or matrix.device.type == "cpu":
            return torch.float32
        return torch.bfloat16


def polar_factor(
    matrix: Tensor,
    method: str = "newton-schulz",
    *,
    coefficients: str = "polar-express",
    steps: int = 6,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Return :math:`U V^\top` for :math:`M = U \Sigma V^\top`, over the non-zero singular values.

    Args:
        matrix: real, shape `(..., rows, columns)`; leading dimensions are a batch.
        method: `"newton-schulz"`, or `"svd"` (exact to rounding, slow: the oracle).
        coefficients: `"polar-express"`, `"jordan"` or `"you"`; for Newton-Schulz.
        steps: number of iterations; for Newton-Schulz. Six Polar Express steps leave every singular value above
            3e-3 of the Frobenius norm within 0.002 of 1 in fp32 and within about 0.03 in bfloat16.
        dtype: arithmetic of the iteration. `None`: float64 for float64 input, bfloat16 on an accelerator, fp32 on
            the CPU.

    Returns:
        A tensor of the shape and dtype of `matrix`. A zero matrix gives zero.

    Raises:
        ValueError: fewer than two dimensions, unknown method or coefficients, `steps` < 1.
        TypeError: a complex or integer matrix.

    References: Bernstein and Newhouse, "Old Optimizer, New Norm" (2024); Amsel et al., "The Polar Express" (2025).
    """
    how = PolarMethod(method, coefficients, steps, dtype)
    if matrix.ndim < 2:
        raise ValueError(f"polar_factor needs a matrix (..., rows, columns); got shape {tuple(matrix.shape)}")
    if not matrix.is_floating_point():
        raise TypeError(f"polar_factor needs a real floating-point matrix; got {matrix.dtype}")
    return polar_factors([matrix], how)[0]


def polar_factors(matrices: Sequence[Tensor], how: PolarMethod) -> list[Tensor]:
    """Return the polar factor of each `(..., rows, columns)` tensor; equal shapes go through one batched call."""
    results: list[Tensor] = [torch.empty_like(m, memory_format=torch.contiguous_format) for m in matrices]
    by_shape: dict[tuple[int, int, torch.dtype], list[int]] = {}
    for i, m in enumerate(matrices):
        if m.numel() == 0:
            continue
        rows, columns = m.shape[-2:]
        by_shape.setdefault((min(rows, columns), max(rows, columns), m.dtype), []).append(i)

    for indices in by_shape.values():
        wide: list[Tensor] = []  # rows <= columns, so that the iterated Gram matrix is the small one
        for i in indices:
            stack = matrices[i].flatten(0, -3) if matrices[i].ndim > 3 else matrices[i]
            stack = stack.unsqueeze(0) if stack.ndim == 2 else stack
            wide.append(stack.mT if stack.shape[-2] > stack.shape[-1] else stack)
        batch = torch.cat(wide) if len(wide) > 1 else wide[0]
        factor = _polar_wide(batch, how)
        for i, part in zip(indices, factor.split([w.shape[0] for w in wide]), strict=True):
            m = matrices[i]
            tall = m.shape[-2] > m.shape[-1]
            results[i].copy_((part.mT if tall else part).reshape(m.shape))
    return results


def _polar_wide(batch: Tensor, how: PolarMethod) -> Tensor:
    """Polar factors of a batch of shape (count, rows, columns) with rows <= columns."""
    dtype = how.arithmetic(batch)
    # Entries are scaled to at most 1 first: the squares in the Frobenius norm must neither overflow nor vanish.
    # Each matrix is scaled by itself, so that an inf or nan stays in its own matrix.
    x = batch.to(torch.promote_types(batch.dtype, torch.float32))
    largest = x.abs().amax(dim=(-2, -1), keepdim=True)
    x = x / torch.where(largest == 0, torch.ones_like(largest), largest)
    if how.method == "svd":
        return _polar_by_svd(x.to(dtype))
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    x = x / torch.where(norm == 0, torch.ones_like(norm), norm)
    return newton_schulz(x.to(dtype), triples(how.coefficients, how.steps, half_precision=dtype in _HALF))


def newton_schulz(x: Tensor, polynomials: Sequence[Triple]) -> Tensor:
    """Apply X <- a X + (b A + c A^2) X with A = X X^T, once for each (a, b, c).

    Args:
        x: shape (count, rows, columns), rows <= columns, each of Frobenius norm at most 1.
        polynomials: one triple an iteration.
    """
    for a, b, c in polynomials:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _polar_by_svd(x: Tensor) -> Tensor:
    bad = ~x.isfinite().all(dim=-1, keepdim=True).all(dim=-2, keepdim=True)  # torch refuses these for all the others
    u, sigma, vh = torch.linalg.svd(x.masked_fill(bad, 0), full_matrices=False)
    # The factor is unique only on the range: directions of zero singular value are left out, not invented.
    cutoff = torch.finfo(x.dtype).eps * max(x.shape[-2:]) * sigma[..., :1]
    factor = (u * (sigma > cutoff).to(x.dtype).unsqueeze(-2)) @ vh
    return factor.masked_fill(bad, torch.nan)
