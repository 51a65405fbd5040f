"""Numbers that lie in a tensor each, as step counts do: all of them at once, on the host."""
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false

from __future__ import annotations

from array import array
from typing import cast

import torch
from torch import Tensor

from .backends import native_library


def add_(scalars: list[Tensor], increment: float) -> list[float]:
    """Add to 0-d tensors on the CPU; return what they are then.

    The native library does without a call of torch's for each, of a microsecond or two.
    """
    dtypes = {scalar.dtype for scalar in scalars}
    is_plain = all(type(scalar) is Tensor for scalar in scalars) and len(dtypes) == 1
    library = None if torch.compiler.is_compiling() or not is_plain else native_library.loaded()
    if library is None or not dtypes <= {torch.float32, torch.float64}:
        torch._foreach_add_(scalars, increment)
        return read(scalars)
    return library.add(array("Q", map(Tensor.data_ptr, scalars)), increment, is_double=dtypes == {torch.float64})


def read(scalars: list[Tensor]) -> list[float]:
    """Return the numbers in 0-d tensors on the CPU."""
    if not scalars:
        return []
    return cast(list[float], torch.stack(scalars).tolist())  # pyright: ignore[reportUnknownMemberType]
