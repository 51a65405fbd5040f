"""A Triton kernel for symmetric products: tiles of the lower triangle, each stored twice. Imported on demand."""
# Triton is not typed.
# pyright: basic, reportMissingImports=false, reportMissingTypeStubs=false, reportMissingModuleSource=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE, _DEPTH = 128, 64


@triton.jit
def _triangle(
    left, right, addend, out, n, k, beta, alpha, left_b, left_n, left_k, right_b, right_k, right_n, add_b, add_n, add_m,
    HAS_ADDEND: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    # Program t of a matrix is tile (row, column) with column <= row and row (row + 1) / 2 + column = t.
    t = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    row = ((tl.sqrt(8.0 * t.to(tl.float32) + 1.0) - 1.0) / 2.0).to(tl.int32)
    row += tl.where((row + 1) * (row + 2) // 2 <= t, 1, 0)  # the root is rounded
    row -= tl.where(row * (row + 1) // 2 > t, 1, 0)
    column = t - row * (row + 1) // 2
    rows = (row * TILE + tl.arange(0, TILE)).to(tl.int64)
    columns = (column * TILE + tl.arange(0, TILE)).to(tl.int64)
    depth = tl.arange(0, DEPTH)
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    a = left + batch * left_b + rows[:, None] * left_n + depth[None, :] * left_k
    b = right + batch * right_b + depth[:, None] * right_k + columns[None, :] * right_n
    for start in range(0, k, DEPTH):
        inside = start + depth < k
        x = tl.load(a, mask=(rows[:, None] < n) & inside[None, :], other=0.0)
        y = tl.load(b, mask=inside[:, None] & (columns[None, :] < n), other=0.0)
        total = tl.dot(x, y, total)
        a += DEPTH * left_k
        b += DEPTH * right_k
    inside = (rows[:, None] < n) & (columns[None, :] < n)
    if HAS_ADDEND:
        old = addend + batch * add_b + rows[:, None] * add_n + columns[None, :] * add_m
        total = beta * tl.load(old, mask=inside, other=0.0).to(tl.float32) + alpha * total
    result = total.to(out.dtype.element_ty)
    here = out + batch * n * n
    tl.store(here + rows[:, None] * n + columns[None, :], result, mask=inside)
    if row != column:
        tl.store(here + columns[:, None] * n + rows[None, :], tl.trans(result), mask=tl.trans(inside))


def triangle_product(
    left: Tensor, right: Tensor, addend: Tensor | None, beta: float, alpha: float, *, tile: int = _TILE
) -> Tensor:
    """Return beta * addend + alpha * left @ right, symmetric; see `symmetric.symmetric_product`."""
    a, b = (x.unsqueeze(0) if x.ndim == 2 else x for x in (left, right))
    count, n, k = a.shape
    has_addend = addend is not None and beta != 0
    c = addend if addend is not None and has_addend else a
    c = c.unsqueeze(0) if c.ndim == 2 else c
    out = torch.empty(count, n, n, dtype=a.dtype, device=a.device)
    tiles = triton.cdiv(n, tile)
    grid = (tiles * (tiles + 1) // 2, count)
    strides = (*a.stride(), *b.stride(), *c.stride())
    options = {"HAS_ADDEND": has_addend, "TILE": tile, "DEPTH": min(_DEPTH, tile)}
    _triangle[grid](a, b, c, out, n, k, beta, alpha if has_addend else 1.0, *strides, **options, num_warps=8)
    return out if left.ndim == 3 else out[0]
