"""The odd quintics whose composition is nearest to 1 on an interval: Polar Express."""

from __future__ import annotations

import math
from collections.abc import Sequence

Triple = tuple[float, float, float]

_LIMIT: Triple = (15 / 8, -10 / 8, 3 / 8)  # p(1) = 1, p'(1) = p''(1) = 0: the minimax quintic on [l, 1] as l -> 1
_CUSHION = 0.02407327424182761  # as in the published run


def polar_express(
    lower_bound: float, steps: int, *, cushion: float = _CUSHION, margins: Sequence[float] = ()
) -> tuple[Triple, ...]:
    r"""Return the quintics whose composition is the best approximation of 1 on `[lower_bound, 1]`.

    .. math::
        p_t = \arg\min_p \max_{l_t \le x \le u_t} |1 - p(x)|, \qquad l_{t+1} = p_t(l_t), \quad u_{t+1} = 2 - l_{t+1}.

    Solving step by step is optimal for the composition. The first triples do not depend on `steps`.

    Args:
        lower_bound: smallest singular value, as a part of the Frobenius norm, to be driven to 1; in (0, 1).
        steps: number of triples, >= 1.
        cushion: while l_t < cushion * u_t, solve on [cushion * u_t, u_t] and centre the result about 1. It bounds how
            small intermediate values may get between the points where the polynomial touches its band.
        margins: for each step the factor, >= 1, by which rounding may have moved singular values before it: the step
            is solved on [l_t / margin, u_t * margin]. 1 where none is given.

    Raises:
        ValueError: an argument out of range.

    Reference: Amsel, Persson, Musco, Gower, "The Polar Express" (2025), whose printed digits are
    `polar_express(1e-3, 7)` before their safety factor.
    """
    if not 0.0 < lower_bound < 1.0:
        raise ValueError(f"lower_bound must be in (0, 1); got {lower_bound!r}")
    if not 0.0 <= cushion < 1.0:
        raise ValueError(f"cushion must be in [0, 1); got {cushion!r}")
    check_steps(steps)
    if len(margins) > steps or not all(1.0 <= margin < math.inf for margin in margins):
        raise ValueError(f"margins must be at most {steps} numbers >= 1, one a step; got {margins!r}")
    low, high = lower_bound, 1.0
    result: list[Triple] = []
    for margin in [*margins, *[1.0] * (steps - len(margins))]:
        low, high = low / margin, high * margin
        start = max(low, cushion * high)
        triple = _minimax(start, high)
        if start > low:
            centre = 2 / (_value(triple, low) + _value(triple, high))
            triple = (triple[0] * centre, triple[1] * centre, triple[2] * centre)
        result.append(triple)
        low = _value(triple, low)
        high = 2 - low
    return tuple(result)


def _value(triple: Triple, x: float) -> float:
    a, b, c = triple
    return x * (a + x * x * (b + x * x * c))


def _minimax(low: float, high: float) -> Triple:
    """Return the odd quintic nearest to 1 on [low, high], by Remez exchange.

    At the optimum, p - 1 has the values -e, e, -e, e at low < q < r < high, where q and r are the extrema of p.
    """
    if low / high > 1 - 5e-6:  # the four points coincide in double precision
        return _LIMIT[0] / high, _LIMIT[1] / high**3, _LIMIT[2] / high**5
    q, r = (3 * low + high) / 4, (low + 3 * high) / 4
    a = b = c = 0.0
    for _ in range(100):
        a, b, c = _through(low, q, r, high)
        root = math.sqrt(9 * b * b - 20 * a * c)
        before = q, r
        q, r = math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))
        if abs(q - before[0]) + abs(r - before[1]) < 1e-15 * high:
            break
    return a, b, c


def _through(*points: float) -> Triple:
    """Solve a x + b x^3 + c x^5 + (-1)^i e = 1 at four points by elimination."""
    rows = [[x, x**3, x**5, (-1.0) ** i, 1.0] for i, x in enumerate(points)]
    for k in range(4):
        pivot = max(range(k, 4), key=lambda i: abs(rows[i][k]))
        rows[k], rows[pivot] = rows[pivot], rows[k]
        for i in range(4):
            if i != k:
                factor = rows[i][k] / rows[k][k]
                rows[i] = [x - factor * y for x, y in zip(rows[i], rows[k], strict=True)]
    return rows[0][4] / rows[0][0], rows[1][4] / rows[1][1], rows[2][4] / rows[2][2]


def check_steps(steps: object) -> None:
    """Raise ValueError unless `steps` is an integer >= 1."""
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"polar_steps must be an integer >= 1; got {steps!r}")
