"""How polar factors are computed: the choices, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .coefficients import triples
from .minimax import Triple
from .newton_schulz import FORMS, HALF

METHODS = ("newton-schulz", "svd", "newton", "qdwh", "sketch")
_DTYPES = (None, torch.float64, torch.float32, *HALF)


@dataclass(frozen=True)
class PolarMethod:
    """How polar factors are computed; see `polar_factor` for the fields."""

    method: str = "newton-schulz"
    coefficients: str | Sequence[Triple] = "polar-express"
    steps: int = 6
    dtype: torch.dtype | None = None
    rank: int | None = None
    form: str = "auto"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"polar_method must be one of {', '.join(METHODS)}; got {self.method!r}")
        if self.dtype not in _DTYPES:
            raise ValueError(f"polar_dtype must be None or a real floating-point dtype; got {self.dtype!r}")
        if self.dtype in HALF and self.method != "newton-schulz":
            raise ValueError(
                f"polar_dtype={self.dtype} is for polar_method='newton-schulz'; {self.method!r} factorises, in "
                "float32 or float64: use None or one of them"
            )
        if self.form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}; got {self.form!r}")
        if (self.method == "sketch") != (self.rank is not None):
            raise ValueError(f"polar_rank belongs to polar_method='sketch'; got {self.method!r} with {self.rank!r}")
        if self.rank is not None and (not isinstance(self.rank, int) or self.rank < 1):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"polar_rank must be an integer >= 1; got {self.rank!r}")
        self.polynomials()

    def polynomials(self, dtype: torch.dtype = torch.float32, form: str = "standard") -> tuple[Triple, ...]:
        """Return the triples of the iteration in `dtype` by the form `form`."""
        return triples(self.coefficients, self.steps, half_precision=dtype in HALF, restarts=form == "gram")

    def arithmetic(self, matrix: Tensor) -> torch.dtype:
        """Return the dtype to iterate in: the given one; else float64 for float64, bfloat16 for bfloat16.

        The rest is iterated in bfloat16 on an accelerator and in fp32 on the CPU; factorisations are made in fp32.
        """
        if self.dtype is not None:
            return self.dtype
        if matrix.dtype == torch.float64:
            return matrix.dtype
        if self.method != "newton-schulz":
            return torch.float32
        on_cpu = matrix.device.type == "cpu"
        return torch.float32 if on_cpu and matrix.dtype != torch.bfloat16 else torch.bfloat16
