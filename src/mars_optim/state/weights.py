"""Half-precision weights without an fp32 copy: how a step's fp32 result is rounded, and what is kept of the rest.

`"nearest"` and `"stochastic"` keep nothing. The others keep a *remainder* beside the weight, so that updates too
small for the weight's format are not lost:

- `"kahan"`: x' - p' in the weight's own format (2 bytes), as in compensated summation;
- `"remainder16"`: the bits of x' that p' lacks (2 bytes); for bfloat16 that is all of them: 32-bit weights;
- `"remainder8"`: the upper eight of them (1 byte), stochastically rounded: 24-bit weights.

A remainder counts in units of the last fp32 bit, or of the 8th last (bfloat16) or 5th last (float16): p' is x' rounded
to nearest, ties away from zero, so that the difference fits. Only in float16's subnormal range does it not; there it
saturates and the weight is as exact as float16 is.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDINGS = ("nearest", "stochastic", "kahan", "remainder8", "remainder16")
_DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}


def remainder_dtype(param: Tensor, rounding: str) -> torch.dtype | None:
    """Return the dtype of the remainder of a parameter; None where it has none."""
    if param.dtype not in _DROPPED_BITS:
        return None
    return {"kahan": param.dtype, "remainder8": torch.int8, "remainder16": torch.int16}.get(rounding)


def decode_weight(param: Tensor, remainder: Tensor | None) -> Tensor:
    """Return the fp32 weight that a half-precision parameter and its remainder stand for."""
    x = param.float()
    if remainder is None:
        return x
    if remainder.is_floating_point():
        return x + remainder
    shift = _DROPPED_BITS[param.dtype] - 8 if remainder.dtype == torch.int8 else 0
    return (x.view(torch.int32) + (remainder.to(torch.int32) << shift)).view(torch.float32)


def encode_weight_(param: Tensor, remainder: Tensor | None, x: Tensor, random: Tensor | None = None) -> None:
    """Store the fp32 weight `x`; `random` has 16 bits for each element where rounding is stochastic."""
    if remainder is None:
        param.copy_(x if random is None else _stochastic(x, param.dtype, random))
        return
    if remainder.is_floating_point():
        param.copy_(x)
    else:
        half = 1 << (_DROPPED_BITS[param.dtype] - 1)
        rounded = ((x.contiguous().view(torch.int32) + half) & -2 * half).view(torch.float32)
        is_normal = x.isfinite() & ((x.abs() >= 2.0**-14) | (param.dtype == torch.bfloat16))
        param.copy_(torch.where(is_normal, rounded, x))
    remainder.copy_(remainder_of(param, x, remainder.dtype, random))


def remainder_of(param: Tensor, x: Tensor, dtype: torch.dtype, random: Tensor | None = None) -> Tensor:
    """Return what `param` lacks of the fp32 weight `x`; 0 where either is not finite."""
    bad = ~(x.isfinite() & param.isfinite())
    if dtype.is_floating_point:
        return (x - param).masked_fill(bad, 0).to(dtype)
    shift = _DROPPED_BITS[param.dtype] - 8 if dtype == torch.int8 else 0
    difference = x.contiguous().view(torch.int32) - param.float().view(torch.int32)
    if shift and random is not None:
        difference = difference + (random & ((1 << shift) - 1)).to(torch.int32)
    info = torch.iinfo(dtype)
    return (difference >> shift).clamp(info.min, info.max).masked_fill(bad, 0).to(dtype)


def _stochastic(x: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """Round up or down to `dtype` with the probabilities that keep the expectation; subnormals to nearest."""
    dropped = _DROPPED_BITS[dtype]
    mask = (1 << dropped) - 1
    bits = x.contiguous().view(torch.int32) + (random & mask).to(torch.int32)
    rounded = (bits & ~mask).view(torch.float32)
    smallest = torch.finfo(dtype).smallest_normal
    return torch.where(x.isfinite() & (x.abs() >= smallest), rounded, x)
