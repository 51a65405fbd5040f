"""How a parameter tensor is seen as one or more matrices, and how large its update should be.

A *matrix view* says which matrices a tensor holds:

- `"flatten"`: one matrix, dimensions after the first flattened: a convolution (out, in, kh, kw) is (out, in*kh*kw);
- `"stack"`: the last two dimensions are the matrix, the others count them: experts (experts, rows, columns);
- `("split", dim, sizes)`: `sizes` along `dim` (0 or 1) are matrices of their own: fused Q, K, V, or single heads.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

MatrixView = str | tuple[str, int, tuple[int, ...]]

# From (rows, columns) of a matrix to the factor on its update.
UPDATE_SCALES: dict[str, Callable[[int, int], float]] = {
    "none": lambda rows, columns: 1.0,
    "spectral": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    "rms": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
}


def register_update_scale(name: str, scale: Callable[[int, int], float]) -> None:
    """Make `update_scale=name` available to every parameter group: (rows, columns) -> factor on the update.

    Raises:
        ValueError: the name is taken.
    """
    if name in UPDATE_SCALES:
        raise ValueError(f"an update scale named {name!r} is already registered; choose another name")
    UPDATE_SCALES[name] = scale


def check_view(view: object) -> MatrixView:
    """Return `view` in its plain form (tuples of ints).

    Raises:
        ValueError: not one of the three forms of a matrix view.
    """
    if view in ("flatten", "stack"):
        return cast(str, view)
    if isinstance(view, (tuple, list)):
        parts = tuple(cast("list[object]", view))
        if len(parts) == 3 and parts[0] == "split" and parts[1] in (0, 1) and isinstance(parts[2], (tuple, list)):
            sizes = cast("list[object]", parts[2])
            if sizes and all(isinstance(s, int) and s > 0 for s in sizes):
                return ("split", cast(int, parts[1]), tuple(cast("list[int]", sizes)))
    raise ValueError(
        f"matrix_view must be 'flatten', 'stack' or ('split', 0 or 1, (positive sizes, ...)); got {view!r}"
    )


def matrices(tensor: Tensor, view: MatrixView) -> list[Tensor]:
    """Return the matrices of `tensor` (two or more dimensions), each of shape (..., rows, columns).

    They share memory with `tensor` where it is contiguous.

    Raises:
        ValueError: the sizes of a split do not add up to the tensor's dimension.
    """
    if view == "stack":
        return [tensor]
    flat = tensor.flatten(1)
    if isinstance(view, str):
        return [flat]
    _, dim, sizes = view
    if sum(sizes) != flat.shape[dim]:
        raise ValueError(
            f"matrix_view splits dimension {dim} into {sizes}, which add up to {sum(sizes)}, but the parameter has "
            f"shape {tuple(tensor.shape)}; give sizes that add up to {flat.shape[dim]}"
        )
    return list(torch.split(flat, list(sizes), dim))


def parts(shape: Sequence[int], view: MatrixView) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Return the matrices of a tensor of `shape` as boxes, (start, stop) in each of its dimensions.

    Raises:
        ValueError: a split of flattened dimensions, which is no box.
    """
    everything = tuple((0, n) for n in shape)
    if view == "flatten":
        return (everything,)
    if view == "stack":
        counts = itertools.product(*(range(n) for n in shape[:-2]))
        return tuple((*((i, i + 1) for i in index), *everything[-2:]) for index in counts)
    _, dim, sizes = cast("tuple[str, int, tuple[int, ...]]", view)
    if dim == 1 and len(shape) > 2:
        raise ValueError(
            f"matrix_view {view} splits the flattened dimensions of a tensor of shape {tuple(shape)}, which cannot be "
            "done where ranks hold pieces of it; split dimension 0, or flatten"
        )
    stops = list(itertools.accumulate(sizes))
    bounds = zip([0, *stops[:-1]], stops, strict=True)
    return tuple((*everything[:dim], pair, *everything[dim + 1 :]) for pair in bounds)


def matrix_shape(box: Sequence[tuple[int, int]], view: MatrixView) -> tuple[int, int]:
    """Return rows and columns of one of the `parts`."""
    sizes = [stop - start for start, stop in box]
    return (sizes[-2], sizes[-1]) if view == "stack" else (sizes[0], math.prod(sizes[1:]))


def update_scale(name: str, rows: int, columns: int, *, transposed: bool = False) -> float:
    """Return the factor on the update of a rows x columns matrix; `transposed`: it is stored as (in, out)."""
    if rows == 0 or columns == 0:
        return 1.0
    return UPDATE_SCALES[name](columns, rows) if transposed else UPDATE_SCALES[name](rows, columns)
