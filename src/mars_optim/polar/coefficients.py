"""Odd quintic polynomials p(x) = a x + b x^3 + c x^5 whose composition drives singular values to 1."""

from __future__ import annotations

from collections.abc import Mapping

Triple = tuple[float, float, float]

# Composing the first T triples maps [3e-3, 1] into the band given, in exact arithmetic; a longer run repeats the
# last triple. Singular values below 3e-3 of the Frobenius norm come out smaller than the band.
COEFFICIENTS: Mapping[str, tuple[Triple, ...]] = {
    # Keller Jordan, "Muon" (2024). Steep at zero, does not converge: T = 5 gives [0.682, 1.202].
    "jordan": ((3.4445, -4.7750, 2.0315),),
    # Jiacheng You (2024). T = 5 gives [0.978, 1.145].
    "you": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    # Amsel, Persson, Musco, Gower, "The Polar Express" (2025): the minimax composition on [1e-3, 1].
    # T = 5 gives [0.876, 1.124], T = 6 [0.998, 1.002]; further steps converge.
    "polar-express": (
        (8.28721, -23.59589, 17.30039),
        (4.10706, -2.94785, 0.54484),
        (3.94869, -2.90890, 0.55182),
        (3.31842, -2.48849, 0.51005),
        (2.30065, -1.66890, 0.41881),
        (1.89130, -1.26800, 0.37681),
        (1.875, -1.25, 0.375),
    ),
}


def triples(coefficients: str, steps: int, *, half_precision: bool) -> tuple[Triple, ...]:
    """Return the polynomials of `steps` iterations.

    Polar Express maps 1 to exactly 1, so a singular value that rounding has pushed above 1 would grow from step to
    step. As in the paper, every step but the last divides its argument by a safety factor, larger in half precision.

    Raises:
        ValueError: unknown coefficients, or `steps` less than 1.
    """
    if coefficients not in COEFFICIENTS:
        raise ValueError(f"polar_coefficients must be one of {', '.join(COEFFICIENTS)}; got {coefficients!r}")
    if not isinstance(steps, int) or steps < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"polar_steps must be an integer >= 1; got {steps!r}")
    table = COEFFICIENTS[coefficients]
    chosen = (table + table[-1:] * steps)[:steps]
    if coefficients != "polar-express":
        return chosen
    safety = 1.05 if half_precision else 1.01
    safe = tuple((a / safety, b / safety**3, c / safety**5) for a, b, c in chosen[:-1])
    return (*safe, chosen[-1])
