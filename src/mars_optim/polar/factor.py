"""The polar factor U V^T of a matrix M = U S V^T."""
# torch.linalg is not typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from .coefficients import plain
from .dense import by_newton, by_qdwh, by_svd
from .method import PolarMethod
from .minimax import Triple
from .native_product import is_available, is_eager, scaled_transpose
from .newton_schulz import newton_schulz
from .sketch import Sketch, sketched

_DENSE = {"svd": by_svd, "newton": by_newton, "qdwh": by_qdwh}
_STACKED_BELOW = 256  # rows; larger matrices fill the CPU's cores one at a time, and stacking them costs a copy


def polar_factor(
    matrix: Tensor,
    method: str = "newton-schulz",
    *,
    coefficients: str | Sequence[Triple] | None = None,
    steps: int | None = None,
    dtype: torch.dtype | None = None,
    rank: int | None = None,
    form: str = "auto",
) -> Tensor:
    r"""Return :math:`U V^\top` for :math:`M = U \Sigma V^\top`, over the non-zero singular values.

    Args:
        matrix: real, shape `(..., rows, columns)`; leading dimensions are a batch.
        method: `"newton-schulz"` (polynomials; fast), `"svd"` (the oracle), `"newton"` or `"qdwh"` (inverses or
            Cholesky and QR; for full rank as accurate as the SVD), `"sketch"` (of rank `rank`, see `polar_sketch`).
        coefficients: for Newton-Schulz: `"polar-express"`, `"jordan"`, `"you"`, or triples (a, b, c) of
            p(x) = a x + b x^3 + c x^5, one for each step, the last one repeated; see `polar_express`. `"degree-17"`:
            three polynomials that are cheaper than five of those. `None`: these in half precision from 256 rows (or
            columns, where they are fewer) on, otherwise `"polar-express"`, as whenever `steps` or `form` is given.
        steps: number of iterations; for Newton-Schulz. `None`: as many as the coefficients are meant for, 6 for
            `"polar-express"` and 5 for `"jordan"` and `"you"`. The default leaves every singular value above 3e-3 of
            the Frobenius norm within 0.001 of 1 in fp32 and within 0.03 in half precision.
        dtype: arithmetic of the iteration. `None`: the input's for float64 and bfloat16; otherwise bfloat16 on an
            accelerator and fp32 on the CPU. Factorisations: fp32 or float64.
        rank: of the sketch.
        form: of quintics: `"standard"`, `"gram"` or `"auto"`, which counts multiplications.

    Returns:
        A tensor of the shape and dtype of `matrix`. A zero matrix gives zero; a matrix with an inf or nan gives nan,
        others of its batch are not touched. Singular values below rounding (of the arithmetic) have no defined
        direction: the SVD and the sketch leave them out, Newton-Schulz leaves them small, Newton and QDWH may make
        them 1.

    Raises:
        ValueError: fewer than two dimensions, an argument out of range.
        TypeError: a complex or integer matrix.

    References: Bernstein and Newhouse, "Old Optimizer, New Norm" (2024); Amsel et al., "The Polar Express" (2025).
    """
    how = PolarMethod(method, plain(coefficients), steps, dtype, rank, form)
    return polar_factors([_checked(matrix)], how)[0]


def polar_sketch(matrix: Tensor, rank: int, *, dtype: torch.dtype | None = None) -> Sketch:
    """Return the polar factor of the leading `rank` singular directions, and the part of `matrix` it leaves out.

    Args:
        matrix: real, shape `(..., rows, columns)`.
        rank: of the factor, >= 1.
        dtype: float32 or float64; `None`: float64 for float64, otherwise float32.

    Returns:
        `factor` as `polar_factor` would, and `residual` of shape `(...)`; see `Sketch`.

    Raises:
        ValueError, TypeError: as `polar_factor`.
    """
    how = PolarMethod("sketch", dtype=dtype, rank=rank)
    batch = _checked(matrix).reshape(-1, *matrix.shape[-2:])
    x, bad = _finite(_normalised(batch, how.arithmetic(batch)))
    factor, residual = sketched(x, rank)
    factor, residual = factor.masked_fill(bad, torch.nan), residual.masked_fill(bad[:, 0, 0], torch.nan)
    return Sketch(factor.to(matrix.dtype).reshape(matrix.shape), residual.reshape(matrix.shape[:-2]))


def polar_factors(matrices: Sequence[Tensor], how: PolarMethod) -> list[Tensor]:
    """Return the polar factor of each `(..., rows, columns)` tensor; equal shapes go through one batched call.

    On the CPU large matrices are taken one at a time. Nothing of the size of all matrices together is created but the
    results; who wants them one at a time calls this with one matrix at a time.
    """
    results: list[Tensor | None] = [None] * len(matrices)
    by_shape: dict[tuple[int, int, torch.dtype, torch.device], list[int]] = {}
    for i, m in enumerate(matrices):
        rows, columns = sorted(m.shape[-2:])
        if m.numel() == 0:
            results[i] = torch.empty_like(m, memory_format=torch.contiguous_format)
        elif m.device.type == "cpu" and rows >= _STACKED_BELOW and how.method == "newton-schulz":
            if is_eager():  # compiling, one would trace into it, and be warned
                _keep_freed_memory()
            parts = [_newton_schulz(_wide(part), how, transposed=_is_tall(m)) for part in m.reshape(-1, *m.shape[-2:])]
            results[i] = parts[0].to(m.dtype) if m.ndim == 2 else torch.stack(parts).to(m.dtype).reshape(m.shape)
        else:
            by_shape.setdefault((rows, columns, m.dtype, m.device), []).append(i)

    for indices in by_shape.values():
        stacks = [_wide(matrices[i].reshape(-1, *matrices[i].shape[-2:])) for i in indices]
        batch = torch.cat(stacks) if len(stacks) > 1 else stacks[0]
        factor = _newton_schulz(batch, how) if how.method == "newton-schulz" else _by_factorisation(batch, how)
        for i, part in zip(indices, factor.split([len(s) for s in stacks]), strict=True):
            m = matrices[i]
            oriented = part.mT.contiguous() if _is_tall(m) else part
            results[i] = oriented.to(m.dtype).reshape(m.shape)
    return [r for r in results if r is not None]


def polar_work(rows: int, columns: int, how: PolarMethod) -> float:
    """Return about how many multiplications the polar factor of one matrix takes, to balance the work of ranks."""
    n, m = sorted((rows, columns))
    if how.method == "newton-schulz":
        return how.multiplications(n, m, how.dtype or torch.bfloat16)
    return 10.0 * n * n * m if how.rank is None else 4.0 * n * m * how.rank


def _checked(matrix: Tensor) -> Tensor:
    if matrix.ndim < 2:
        raise ValueError(f"polar_factor needs a matrix (..., rows, columns); got shape {tuple(matrix.shape)}")
    if not matrix.is_floating_point():
        raise TypeError(f"polar_factor needs a real floating-point matrix; got {matrix.dtype}")
    return matrix


def _is_tall(matrix: Tensor) -> bool:
    return matrix.shape[-2] > matrix.shape[-1]


def _wide(matrix: Tensor) -> Tensor:
    return matrix.mT if _is_tall(matrix) else matrix


def _newton_schulz(x: Tensor, how: PolarMethod, *, transposed: bool = False) -> Tensor:
    """Polar factor of a matrix, or of a batch of shape (count, rows, columns), with rows <= columns."""
    dtype = how.arithmetic(x)
    # Products of rows with rows are the faster ones on the CPU, by more than the copy costs.
    stages = how.stages(x.shape[-2], x.shape[-1], dtype)
    return newton_schulz(_normalised(x, dtype).contiguous(), stages, transposed=transposed)


@cache
def _keep_freed_memory() -> None:
    """Free one large block. Of freed memory glibc keeps twice the largest block that it has seen freed.

    Otherwise the result of each product would lie on new pages of the system, which takes a tenth of the time.
    """
    torch.empty(31 << 20, dtype=torch.uint8)  # 32 MB is the most that it goes by


def _by_factorisation(batch: Tensor, how: PolarMethod) -> Tensor:
    # A matrix with an inf or nan must not spoil, nor stop, the factorisation of the others.
    x, bad = _finite(_normalised(batch, how.arithmetic(batch)))
    factor = sketched(x, how.rank).factor if how.rank is not None else _DENSE[how.method](x)
    return factor.masked_fill(bad, torch.nan)


def _finite(x: Tensor) -> tuple[Tensor, Tensor]:
    bad = x[..., :1, :1].isnan()  # `_normalised` makes the whole matrix nan
    return x.masked_fill(bad, 0), bad


def _normalised(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x / ||x||_F in `dtype`: zero for zero, nan where the norm is not finite; each matrix by itself."""
    if x.dtype == torch.float16:
        x = x.float()  # the norm itself may be too large for float16
    if x.ndim == 2 and x.device.type == "cpu" and is_eager(x):  # there looking at the norm costs nothing
        size = torch.linalg.vector_norm(x).item()
        if 1e-12 < size < 1e12:
            if x.mT.is_contiguous() and is_available(dtype):
                return scaled_transpose(x.mT.to(dtype), 1 / size)
            return torch.mul(x, 1 / size, out=torch.empty_like(x, dtype=dtype))
    dims = (-2, -1)
    # Entries are brought to [1, 2) first: the squares must neither overflow nor vanish. Powers of 2 round nothing.
    largest = torch.maximum(x.amax(dims, keepdim=True), -x.amin(dims, keepdim=True))
    power = torch.where(largest == 0, torch.ones_like(largest), largest).log2().floor().exp2()
    x = x / _divisor(power, x)
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True)
    divisor = torch.where(norm == 0, torch.ones_like(norm), norm)
    divisor = torch.where(norm.isfinite(), divisor, torch.full_like(norm, torch.nan))
    return (x / _divisor(divisor, x)).to(dtype)


def _divisor(value: Tensor, x: Tensor) -> Tensor:
    """Return the (..., 1, 1) tensor `value` so that dividing a single matrix by it is one fast pass."""
    return value.reshape(()) if x.ndim == 2 else value
