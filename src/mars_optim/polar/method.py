"""How polar factors are computed: the choices, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .coefficients import DEFAULT_STEPS, triples
from .minimax import Triple, check_steps
from .newton_schulz import FORMS, GRAM_FROM, HALF, Stage, cheaper_form, multiplications, quintic_stages
from .squaring import DEGREE_17, by_squaring, multiplications_by_squaring

METHODS = ("newton-schulz", "svd", "newton", "qdwh", "sketch")
_DTYPES = (None, torch.float64, torch.float32, *HALF)


@dataclass(frozen=True)
class PolarMethod:
    """How polar factors are computed; see `polar_factor` for the fields."""

    method: str = "newton-schulz"
    coefficients: str | Sequence[Triple] | None = None
    steps: int | None = None
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
        if self.steps is not None:
            check_steps(self.steps)
        if self.coefficients == "degree-17" and (self.steps not in (None, len(DEGREE_17)) or self.form != "auto"):
            raise ValueError(
                f"polar_coefficients='degree-17' are {len(DEGREE_17)} polynomials that belong together, of one form; "
                f"leave out polar_steps={self.steps!r} and form={self.form!r}"
            )

    def stages(self, rows: int, columns: int, dtype: torch.dtype) -> list[Stage]:
        """Return the stages of Newton-Schulz for rows <= columns in `dtype`."""
        if self._chosen(rows, dtype) == "degree-17":
            return [partial(by_squaring, coefficients=row) for row in DEGREE_17]
        form = self._form(rows, columns, dtype)
        coefficients = self.coefficients or "polar-express"
        polynomials = triples(coefficients, self._num_steps, half_precision=dtype in HALF, restarts=form == "gram")
        return quintic_stages(polynomials, form, dtype)

    def multiplications(self, rows: int, columns: int, dtype: torch.dtype) -> float:
        """Return the multiply-adds of Newton-Schulz for rows <= columns, counting symmetric products as half."""
        if self._chosen(rows, dtype) == "degree-17":
            return multiplications_by_squaring(rows, columns)
        return multiplications(rows, columns, self._num_steps, dtype, self._form(rows, columns, dtype))

    @property
    def _num_steps(self) -> int:
        if self.steps is not None:
            return self.steps
        if isinstance(self.coefficients, str | None):
            return DEFAULT_STEPS[self.coefficients or "polar-express"]
        return len(self.coefficients)

    def _chosen(self, rows: int, dtype: torch.dtype) -> str | Sequence[Triple]:
        """Return the coefficients: the given ones, else the cheapest that are accurate enough in `dtype`."""
        if self.coefficients is not None:
            return self.coefficients
        is_fastest = dtype in HALF and rows >= GRAM_FROM and self.steps is None and self.form == "auto"
        return "degree-17" if is_fastest else "polar-express"

    def _form(self, rows: int, columns: int, dtype: torch.dtype) -> str:
        return self.form if self.form != "auto" else cheaper_form(rows, columns, self._num_steps, dtype)

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
