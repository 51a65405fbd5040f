r"""Newton-Schulz iteration, X <- p(X) with p(X) = a X + b (X X^T) X + c (X X^T)^2 X, in two forms.

**Standard**: X_{t+1} = (a I + b R + c R^2) X_t with R = X_t X_t^T. Three products, two of them with X.

**Gram**: with R_0 = X X^T all iterations are polynomials of R_0. With Q_0 = I, Y_0 = R_0,

    R_t = Q_t Y_t,   P_t = a I + b R_t + c R_t^2,   Y_{t+1} = Y_t P_t,   Q_{t+1} = P_t Q_t,   X_T = Q_T X,

so that only the first and the last product involve X and all others are of the small size. Rounding of R_0, about
2^-9 of its norm in bfloat16, is as large as the squares of small singular values: their directions of R_t turn
negative and grow like the product of the a^2. So the iteration starts anew from X_t every few steps (`segments`):
in stages, of one step in the standard form. `squaring` has stages of another kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from .minimax import Triple
from .squaring import plus_diagonal
from .symmetric import product, symmetric_product, transposed_product

# From X X^T to (scalar, rest) with Q = scalar * I + rest, by which X is then multiplied.
Stage = Callable[[Tensor], tuple[float, Tensor]]

GRAM_FROM = 256  # rows
FORMS = ("auto", "standard", "gram")
HALF = (torch.bfloat16, torch.float16)


def newton_schulz(x: Tensor, stages: Sequence[Stage], *, transposed: bool = False) -> Tensor:
    """Apply the odd polynomials that the stages are to the singular values of `x`, one after the other.

    Args:
        x: shape (rows, columns) or (count, rows, columns), rows <= columns, each of Frobenius norm at most 1.
        stages: what X is multiplied by.
        transposed: return the transpose, stored row by row (the last product makes it so at no cost).
    """
    for i, stage in enumerate(stages):
        scalar, rest = stage(symmetric_product(x, x.mT))
        if transposed and i == len(stages) - 1:
            return transposed_product(rest, x, x, beta=scalar)
        x = product(rest, x, x, beta=scalar)
    return x


def quintic_stages(polynomials: Sequence[Triple], form: str, dtype: torch.dtype) -> list[Stage]:
    """Return the stages of one polynomial a x + b x^3 + c x^5 after the other, by `"standard"` or `"gram"` form."""
    if form == "standard":
        return [partial(_several_steps, polynomials=[p], keep_multiple_of_identity=True) for p in polynomials]
    stages: list[Stage] = []
    start = 0
    for length in segments(len(polynomials), dtype):
        steps = polynomials[start : start + length]
        stages.append(partial(_several_steps, polynomials=steps, keep_multiple_of_identity=start == 0))
        start += length
    return stages


def segments(steps: int, dtype: torch.dtype) -> list[int]:
    """Return how many steps the Gram form takes between restarts: three, two in half precision, or less at the end.

    Shorter costs products with X; longer lets rounding grow, in fp32 as well as in bfloat16 (`docs/polar.md`).
    """
    longest = 2 if dtype in HALF else 3
    count = -(-steps // longest)
    return [steps // count + (i < steps % count) for i in range(count)]


def cheaper_form(rows: int, columns: int, steps: int, dtype: torch.dtype) -> str:
    """Return the form with fewer multiplications for rows <= columns.

    Below 256 rows calls cost more than multiplications, and the standard form is more accurate.
    """
    if rows < GRAM_FROM:
        return "standard"
    forms = ("standard", "gram")
    return min(forms, key=lambda form: multiplications(rows, columns, steps, dtype, form))


def multiplications(rows: int, columns: int, steps: int, dtype: torch.dtype, form: str) -> float:
    """Return the multiply-adds of an iteration for rows <= columns, counting symmetric products as half.

    In units of rows^3 / 2, with a = columns / rows and r segments: standard T (3a + 1), Gram 4T - 3r + 3ra.
    """
    aspect, restarts = columns / max(rows, 1), len(segments(steps, dtype))
    units = steps * (3 * aspect + 1) if form == "standard" else 4 * steps + 3 * restarts * (aspect - 1)
    return units * rows**3 / 2


def _several_steps(
    r: Tensor, polynomials: Sequence[Triple], *, keep_multiple_of_identity: bool
) -> tuple[float, Tensor]:
    """Return (scalar, rest) with Q = scalar * I + rest, the matrix that takes the given steps: X_t = Q X."""
    y, scalar, rest = r, 0.0, None
    for i, (a, b, c) in enumerate(polynomials):
        g = symmetric_product(r, r, r, beta=b, alpha=c)  # P without a I
        is_last = i == len(polynomials) - 1
        # Y_2, Q_2, ... are symmetric only as far as P_0 and P_1 commute. Making them so would spread the rounding of
        # one factor, 30 times larger, over the other; R and G are symmetric by construction.
        multiply = product if keep_multiple_of_identity else symmetric_product
        if not is_last:
            y = (symmetric_product if i == 0 else multiply)(y, g, y, beta=a)
        if rest is None:
            scalar, rest = (a, g) if keep_multiple_of_identity else (0.0, plus_diagonal(g, a))
        else:
            rest = multiply(g, rest, torch.add(rest, g, alpha=scalar / a) if scalar else rest, beta=a)
            scalar *= a
        if not is_last:
            r = symmetric_product(rest, y, y, beta=scalar)
    assert rest is not None
    return scalar, rest
