r"""Three odd polynomials of degree 17 whose composition drives singular values to 1, each made by three squarings.

With R = X X^T and a row (a, b, d, e, f, g, h) of `DEGREE_17`,

    V = a R^2 + b R + d I,   W = V^2 + e R + f I,   X <- (W^2 + g R + h I) X

V, W and the bracket are symmetric by construction, so that of five products three count as half, as does R. In units of
rows^3 / 2, with columns = aspect * rows, that is 3 * aspect + 3, where two quintics, of degree 25 together, take
3 * aspect + 5 in the Gram form and 6 * aspect + 2 in the standard one.
"""

from __future__ import annotations

from torch import Tensor

from .native_product import is_eager
from .symmetric import symmetric_product

Septuple = tuple[float, float, float, float, float, float, float]

# Each row is the best of its form for the singular values it meets, of which the largest may be off by what rounding to
# half precision adds: the first for [3e-3, 1], the others for what the one before leaves (`benchmarks/degree_17.py`
# finds them, `docs/polar.md` says why). In exact arithmetic [3e-3, 1] ends in [0.9978, 1.0022].
DEGREE_17: tuple[Septuple, ...] = (
    (14.91642134, -16.11022865, 2.662755881, 1.008761768, -2.047902869, -0.2111516051, 0.5826305979),
    (0.4698655208, -2.31185898, 1.854624663, 0.09109956449, -0.7860066147, -0.1389438208, 0.9773620751),
    (0.3786050777, -1.410546628, 1.229271096, 0.3272432248, -0.08028651631, -0.5489177182, 1.469026752),
)


def by_squaring(r: Tensor, coefficients: Septuple) -> tuple[float, Tensor]:
    """Return (h, W^2 + g R): the multiple of the identity would cost the sum its last digits in half precision.

    Args:
        r: X X^T, shape (rows, rows) or (count, rows, rows).
        coefficients: (a, b, d, e, f, g, h).
    """
    a, b, d, e, f, g, h = coefficients
    v = plus_diagonal(symmetric_product(r, r, r, beta=b, alpha=a), d)
    w = plus_diagonal(symmetric_product(v, v, r, beta=e), f)
    return h, symmetric_product(w, w, r, beta=g)


def multiplications_by_squaring(rows: int, columns: int) -> float:
    """Return the multiply-adds of all of `DEGREE_17` for rows <= columns, counting symmetric products as half."""
    return len(DEGREE_17) * (3 * columns / max(rows, 1) + 3) * rows**3 / 2


def plus_diagonal(matrix: Tensor, value: float) -> Tensor:
    """Return matrix + value * I, in the memory of `matrix` where that may be written to."""
    result = matrix if is_eager(matrix) else matrix.clone()
    result.diagonal(dim1=-2, dim2=-1).add_(value)
    return result
