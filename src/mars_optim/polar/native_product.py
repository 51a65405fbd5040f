"""Products of matrices on the CPU by the native kernel, where it is faster than torch's.

That is with AVX-512 in fp32, and with AVX512-BF16 but no matrix units in bfloat16. Half of a symmetric product is a
mirror image of the other half, and costs no multiplications; sums with an addend and transposes cost no pass of their
own.
`native/csrc/product.h` has the kernel.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from mars_optim.native import Isa, NativeUnavailable, forced_isa, handle

_FORMATS = {torch.float32: 0, torch.bfloat16: 2}
_RIGHT_TRANSPOSED, _OUT_TRANSPOSED, _TRIANGLE = 1, 2, 4
_FROM = 256  # rows, columns and depth; below, calls cost more than they save (`benchmarks/polar.py`)


class _Product(ctypes.Structure):
    """`Product` of `native/csrc/abi.h`."""

    _fields_ = (
        ("format", ctypes.c_int32),
        ("flags", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("depth", ctypes.c_int64),
        ("left", ctypes.c_void_p),
        ("right", ctypes.c_void_p),
        ("addend", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("left_stride", ctypes.c_int64),
        ("right_stride", ctypes.c_int64),
        ("addend_stride", ctypes.c_int64),
        ("out_stride", ctypes.c_int64),
        ("alpha", ctypes.c_double),
        ("beta", ctypes.c_double),
    )


def is_available(dtype: torch.dtype) -> bool:
    """Return whether this machine multiplies matrices of `dtype` here."""
    return dtype in _FORMATS and bool(_formats() >> _FORMATS[dtype] & 1)


def is_eager(*operands: Tensor) -> bool:
    """Return whether nothing is compiled or differentiated, so that results may be written to given memory."""
    return not torch.compiler.is_compiling() and not (
        torch.is_grad_enabled() and any(x.requires_grad for x in operands)
    )


def takes(left: Tensor, right: Tensor, addend: Tensor | None) -> bool:
    """Return whether `native_product` can multiply these, and it pays."""
    operands = [left, right] if addend is None else [left, right, addend]
    return (
        is_eager(*operands)
        and left.device.type == "cpu"
        and left.ndim == 2
        and min(left.shape[0], right.shape[1], left.shape[1]) >= _FROM
        and left.shape[1] % 2 == 0
        and is_available(left.dtype)
        and left.stride(1) == 1
        and (addend is None or addend.stride(1) == 1)
        and 1 in right.stride()
        and all(type(x) in (Tensor, torch.nn.Parameter) and x.dtype == left.dtype for x in operands)
    )


def native_product(
    left: Tensor,
    right: Tensor,
    addend: Tensor | None = None,
    *,
    beta: float = 1.0,
    alpha: float = 1.0,
    is_symmetric: bool = False,
    transposed: bool = False,
) -> Tensor:
    """Return beta * addend + alpha * left @ right of operands that `takes` accepts.

    Args:
        left: shape (n, k), with rows whose numbers are neighbours.
        right: shape (k, m), or the transpose of such.
        addend: shape (n, m).
        beta: factor on `addend`.
        alpha: factor on the product.
        is_symmetric: the result is, up to rounding; its upper half mirrors the lower one.
        transposed: return the transpose, stored row by row.
    """
    (n, k), m = left.shape, right.shape[1]
    is_right_transposed = right.stride(1) != 1
    out = left.new_empty((m, n) if transposed else (n, m))
    call = _Product(
        format=_FORMATS[left.dtype],
        flags=is_right_transposed * _RIGHT_TRANSPOSED + transposed * _OUT_TRANSPOSED + is_symmetric * _TRIANGLE,
        num_threads=torch.get_num_threads(),
        rows=n,
        columns=m,
        depth=k,
        left=left.data_ptr(),
        right=right.data_ptr(),
        addend=None if addend is None else addend.data_ptr(),
        out=out.data_ptr(),
        left_stride=left.stride(0),
        right_stride=right.stride(1 if is_right_transposed else 0),
        addend_stride=0 if addend is None else addend.stride(0),
        out_stride=out.stride(0),
        alpha=alpha,
        beta=beta,
    )
    _run(call)
    return out


def scaled_transpose(x: Tensor, scale: float) -> Tensor:
    """Return (scale * x)^T, stored row by row, of a matrix with rows whose numbers are neighbours."""
    out = x.new_empty(x.shape[1], x.shape[0])
    call = _Product(  # of depth 0
        format=_FORMATS[x.dtype],
        flags=_OUT_TRANSPOSED,
        num_threads=torch.get_num_threads(),
        rows=x.shape[0],
        columns=x.shape[1],
        addend=x.data_ptr(),
        out=out.data_ptr(),
        addend_stride=x.stride(0),
        out_stride=out.stride(0),
        beta=scale,
    )
    _run(call)
    return out


def _run(call: _Product) -> None:
    if handle().mars_product(ctypes.byref(call)) != 0:
        fields = ", ".join(f"{field[0]}={getattr(call, field[0])}" for field in call._fields_)
        raise RuntimeError(f"the native kernels refused a product: {fields}")


@cache
def _formats() -> int:
    try:
        isa = forced_isa()
        return handle().mars_product_formats() if isa in (None, Isa.AVX512) else 0
    except NativeUnavailable:
        return 0
