"""Odd polynomials whose composition drives singular values to 1: quintics p(x) = a x + b x^3 + c x^5, and names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import cast

from .minimax import Triple, check_steps, polar_express
from .squaring import DEGREE_17

LOWER_BOUND = 3e-3
"""Singular values, as parts of the Frobenius norm, from which `"polar-express"` is minimax: see `docs/polar.md`."""

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
    # T = 5 gives [0.994, 1.006], T = 6 1 +- 1e-5; further steps converge.
    "polar-express": polar_express(LOWER_BOUND, 10),
}

NAMES = (*COEFFICIENTS, "degree-17")
DEFAULT_STEPS = {"jordan": 5, "you": 5, "polar-express": 6, "degree-17": len(DEGREE_17)}

_MARGIN, _RESTART_MARGIN = 1.05, 1.2


@cache
def _with_margins(steps: int) -> tuple[Triple, ...]:
    """Polar Express solved for what rounding to half precision may have done to singular values before each step.

    The Gram form starts anew from X_t = Q X before every second step. With Q of about 30 in bfloat16, the large
    singular values may then be wrong by 3 x 30 x 2^-9, if the entries of their directions are alike and all rounded to
    the same side. What is wrong before the last step can't grow any more.
    """
    margins = [1.0, *(_MARGIN if i % 2 else _RESTART_MARGIN for i in range(1, steps - 1)), _MARGIN][:steps]
    return polar_express(LOWER_BOUND, steps, margins=margins)


def triples(
    coefficients: str | Sequence[Triple], steps: int, *, half_precision: bool, restarts: bool = False
) -> tuple[Triple, ...]:
    """Return the polynomials of `steps` iterations; a table that is shorter repeats its last triple.

    Polar Express maps 1 to exactly 1, so a singular value that rounding has pushed above 1 would grow from step to
    step. As in the paper, every step but the last divides its argument by a safety factor, larger in half precision:
    p(x / s) has the coefficients a/s, b/s^3, c/s^5. Where the Gram form `restarts` in half precision that is not
    enough: there each step is solved on an interval that is wider by what rounding does. Custom triples are used as
    they are.

    Raises:
        ValueError: `steps` less than 1.
    """
    check_steps(steps)
    table = COEFFICIENTS[coefficients] if isinstance(coefficients, str) else tuple(coefficients)
    if coefficients == "polar-express" and half_precision and restarts:
        return _with_margins(steps)
    chosen = (table + table[-1:] * steps)[:steps]
    if coefficients != "polar-express":
        return chosen
    s = 1.05 if half_precision else 1.01
    return (*((a / s, b / s**3, c / s**5) for a, b, c in chosen[:-1]), chosen[-1])


def check(coefficients: str) -> str:
    """Return the name of a table of coefficients.

    Raises:
        ValueError: no such name.
    """
    if coefficients not in NAMES:
        raise ValueError(
            f"polar_coefficients must be None, one of {', '.join(NAMES)}, or a tuple of triples (a, b, c); "
            f"got {coefficients!r}"
        )
    return coefficients


def plain(coefficients: object) -> str | tuple[Triple, ...] | None:
    """Return a name, or None, as it is, and triples as tuples of floats.

    Raises:
        ValueError: something else.
    """
    if coefficients is None:
        return None
    if isinstance(coefficients, str):
        return check(coefficients)
    if isinstance(coefficients, (list, tuple)) and coefficients:
        rows = [_numbers(row) for row in cast("Sequence[object]", coefficients)]
        if all(len(row) == 3 for row in rows):
            return tuple((a, b, c) for a, b, c in rows)
    return check(f"{coefficients!s}")


def _numbers(row: object) -> tuple[float, ...]:
    values = cast("Sequence[object]", row) if isinstance(row, (list, tuple)) else ()
    return tuple(float(x) for x in values if isinstance(x, (int, float)))
