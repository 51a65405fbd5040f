"""Products of matrices that are known to be symmetric: half of the result is a mirror image of the other half.

On the CPU the native kernel does this where there is one; elsewhere the lower triangle is computed in strips of rows,
and each strip is mirrored: with k strips this needs (k + 1) / (2k) of the multiplications. On CUDA a Triton kernel
computes the tiles of one triangle and stores each twice; it is used after `use_triton(True)`. Where matrices are too
small to gain, the product is a plain one.
"""

from __future__ import annotations

from importlib import import_module
from itertools import pairwise

import torch
from torch import Tensor

from .native_product import is_eager, native_product, takes

_BLOCKED_FROM = 512  # rows; below, calls cost more than the multiplications they save (`benchmarks/polar.py`)
_triton = False


def use_triton(enabled: bool) -> None:
    """Switch the Triton kernel for symmetric products on CUDA on or off (off by default).

    Raises:
        ImportError: Triton is not installed.
    """
    global _triton
    if enabled:
        import_module(".triton_symmetric", __package__)  # says now, not in the middle of a step, that it is missing
    _triton = enabled


def symmetric_product(
    left: Tensor, right: Tensor, addend: Tensor | None = None, *, beta: float = 1.0, alpha: float = 1.0
) -> Tensor:
    """Return beta * addend + alpha * left @ right, which must be symmetric up to rounding.

    Args:
        left: shape (n, k) or (count, n, k).
        right: shape (k, n) or (count, k, n).
        addend: symmetric, shape (n, n) or (count, n, n).
        beta: factor on `addend`.
        alpha: factor on the product; used with an addend only.
    """
    n = left.shape[-2]
    if _triton and left.device.type == "cuda" and left.dtype in (torch.bfloat16, torch.float16):
        from .triton_symmetric import triangle_product

        return triangle_product(left, right, addend, beta, alpha)
    if takes(left, right, addend):
        return native_product(left, right, addend, beta=beta, alpha=alpha, is_symmetric=True)
    if left.ndim == 3 or left.device.type != "cpu" or n < _BLOCKED_FROM or not is_eager(left, right):
        return product(left, right, addend, beta=beta, alpha=alpha)
    result = left.new_empty(n, n)
    count = 3 if n < 1200 else 6
    bounds = [n * i // count for i in range(count + 1)]
    for low, high in pairwise(bounds):
        a, b, out = left[low:high], right[:, :high], result[low:high, :high]
        if addend is None or beta == 0:
            torch.mm(a, b, out=out)
        else:
            torch.addmm(addend[low:high, :high], a, b, beta=beta, alpha=alpha, out=out)
        if low:
            result[:low, low:high] = result[low:high, :low].mT
    return result


def product(
    left: Tensor, right: Tensor, addend: Tensor | None = None, *, beta: float = 1.0, alpha: float = 1.0
) -> Tensor:
    """Return beta * addend + alpha * left @ right, of matrices or of batches; alpha needs an addend."""
    if takes(left, right, addend):
        return native_product(left, right, addend, beta=beta, alpha=alpha)
    if addend is None or beta == 0:
        return left @ right
    if left.ndim == 2:
        return torch.addmm(addend, left, right, beta=beta, alpha=alpha)
    return torch.baddbmm(addend, left, right, beta=beta, alpha=alpha)


def transposed_product(left: Tensor, right: Tensor, addend: Tensor, *, beta: float) -> Tensor:
    """Return the transpose of beta * addend + left @ right, stored row by row; `left` is symmetric up to rounding."""
    if takes(left, right, addend):
        return native_product(left, right, addend, beta=beta, transposed=True)
    return product(right.mT, left, addend.mT, beta=beta)
