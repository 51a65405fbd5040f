"""Finds the three polynomials of degree 17 that `mars_optim.polar.squaring` has as a table.

    python benchmarks/degree_17.py

A row (a, b, d, e, f, g, h) stands for p(x) = x ((V^2 + e x^2 + f)^2 + g x^2 + h) with V = a x^4 + b x^2 + d. Each is
sought on the interval that the one before leaves, scaled to [l, 1], as the one with the least

    max over x in [l, 1] of |p(x) - 1| + noise * x,

where noise is what rounding to half precision may add to p(x) / x: it makes the polynomial stay clear of 0 and of its
upper bound at large x, where noise * x is largest. Starting points are found by least squares in rising powers from
random ones; sequential linear programs then lead to the minimum.
"""
# scipy has no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares, linprog

Array = NDArray[np.float64]
LOWER_BOUND = 3e-3
# For each polynomial: by how much its interval is wider at both ends than what the one before leaves, and the noise.
# 1.06 and 0.17 is the most that was seen (`docs/polar.md`).
SPECIFICATION = ((1.0, 0.3), (1.1, 0.25), (1.05, 0.0))


def value(p: Array, x: Array) -> Array:
    a, b, d, e, f, g, h = p
    r = x * x
    w = (a * r * r + b * r + d) ** 2 + e * r + f
    return x * (w * w + g * r + h)


def derivatives(p: Array, x: Array) -> Array:
    """Central differences with respect to the seven numbers, shape (len(x), 7)."""
    steps = 1e-6 * np.maximum(1e-2, np.abs(p))
    return np.stack([(value(p + s, x) - value(p - s, x)) / (2 * s.max()) for s in np.diag(steps)], 1)


def grid(low: float, count: int) -> Array:
    return np.unique(np.r_[np.geomspace(low, 1, count), 1 - (1 - low) * (1 + np.cos(np.linspace(0, np.pi, count))) / 2])


def minimised(p: Array, low: float, noise: float, count: int = 500) -> tuple[Array, float]:
    """Follow linear programs from `p` to a local minimum."""
    x = grid(low, count)
    penalty = noise * x

    def objective(p: Array) -> float:
        return float(np.max(np.abs(value(p, x) - 1) + penalty))

    best, reach = objective(p), 0.2
    while reach > 1e-9:
        off, scale = value(p, x) - 1, np.maximum(np.abs(p), 1e-2)
        near = np.abs(off) + penalty > 0.6 * best
        slopes, ones = derivatives(p, x[near]) * scale, np.ones((near.sum(), 1))
        solution: Any = linprog(
            np.r_[np.zeros(7), 1],
            A_ub=np.block([[slopes, -ones], [-slopes, -ones]]),
            b_ub=np.r_[-off[near] - penalty[near], off[near] - penalty[near]],
            bounds=[(-reach, reach)] * 7 + [(0, None)],
        )
        candidate = p + solution.x[:7] * scale if solution.status == 0 else p
        if objective(candidate) < best - 1e-12:
            p, best, reach = candidate, objective(candidate), min(2 * reach, 0.3)
        else:
            reach /= 3
    return p, best


def sought(low: float, noise: float, starts: int = 60) -> Array:
    """Return the best of the minima that random starting points lead to."""
    generator, x = np.random.default_rng(0), grid(low, 100)
    found: list[tuple[float, Array]] = []
    for _ in range(starts):
        p = generator.standard_normal(7) * [15, 15, 3, 1, 2, 1, 1]
        for power in (1, 3, 7):
            p = least_squares(lambda p, power=power: (value(p, x) - 1) ** power, p, max_nfev=150, method="lm").x
        found.append((float(np.max(np.abs(value(p, x) - 1))), p))
    found.sort(key=lambda pair: pair[0])
    results: list[tuple[Array, float]] = []
    for _, start in found[:4]:
        p = start
        for part in (0.0, 0.25, 0.5, 0.75):
            p, _ = minimised(p, low, part * noise, 150)
        results.append(minimised(p, low, noise))
    best = min(results, key=lambda pair: pair[1])[0]
    return best * np.where(np.arange(7) < 3, np.sign(best[0]), 1)  # -V does what V does


def main() -> None:
    low, high = LOWER_BOUND, 1.0
    exact = np.geomspace(low, high, 100_001)
    for wider, noise in SPECIFICATION:
        low, high = low / wider, high * wider
        p = sought(low / high, noise)
        x = grid(low / high, 20_000)
        y = value(p, x)
        a, b, d, e, f, g, h = p
        # p(x / high) in the same form.
        row = (a * high**-4.25, b * high**-2.25, d * high**-0.25, e * high**-2.5, f * high**-0.5, g / high**3, h / high)
        low, high = float((y - noise * x).min()), float((y + noise * x).max())
        exact = value(np.array(row), exact)
        print(", ".join(f"{number:.10g}" for number in row))
        print(f"    ends in [{exact.min():.6f}, {exact.max():.6f}]; with noise the next meets [{low:.4f}, {high:.4f}]")


if __name__ == "__main__":
    main()
