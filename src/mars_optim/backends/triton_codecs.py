"""Blocks of elements from and to their storage formats, in Triton: those of native/csrc/codecs.h and weights.h.

A format is the Triton type of the stored elements; int8 and uint8 are the two 8-bit formats. Element i of a block
stands at row i // 128, column i % 128, so that a row shares a scale. FULL: the whole block lies inside the tensor, and
no access is masked, which is what lets accesses be 16 bytes wide; ALIGNED: all addresses are multiples of 16. bfloat16
and what rounds to it are handled as integers, so that rounding is the same everywhere.
"""
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .native_library import Q8_BLOCK, Rounding
from .triton_tables import BLOCK_SIZE

NUM_WARPS = 8  # eight elements a thread: 16 bytes of a half-precision operand, twice that of fp32
FORMATS = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
}
BLOCK = tl.constexpr(BLOCK_SIZE)
ROW = tl.constexpr(Q8_BLOCK)
ROWS = tl.constexpr(BLOCK_SIZE // Q8_BLOCK)
NEAREST, STOCHASTIC, KAHAN, REMAINDER16, REMAINDER8 = (tl.constexpr(int(r)) for r in Rounding)


@triton.jit
def places():
    """The elements' numbers in their block."""
    return tl.arange(0, ROWS)[:, None] * ROW + tl.arange(0, ROW)[None, :]


@triton.jit
def pointer(address, start, FORMAT: tl.constexpr, ALIGNED: tl.constexpr):
    """To the element at `start`."""
    p = address.to(tl.pointer_type(FORMAT))
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    return p + start


@triton.jit
def read(address, start, n, FORMAT: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr):
    """The block as it is stored; zeros where it reaches beyond the tensor."""
    p = pointer(address, start, FORMAT, ALIGNED) + places()
    if FULL:
        stored = tl.load(p)
    else:
        stored = tl.load(p, mask=start + places() < n, other=0)
    return stored


@triton.jit
def write(address, start, n, stored, FORMAT: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr):
    """Store the block."""
    p = pointer(address, start, FORMAT, ALIGNED) + places()
    if FULL:
        tl.store(p, stored.to(FORMAT))
    else:
        tl.store(p, stored.to(FORMAT), mask=start + places() < n)


@triton.jit
def random_bits(key, start):
    """32 bits for each element: `mars_optim.state.random_bits`."""
    h = (key ^ (key >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return (start + places()).to(tl.uint32) * 0x9E3779B1 + (h ^ (h >> 16))


@triton.jit
def widen(half, FORMAT: tl.constexpr):
    """16 bits as fp32."""
    if FORMAT == tl.bfloat16:
        wide = (half.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = half.to(tl.float16, bitcast=True).to(tl.float32)
    return wide


@triton.jit
def narrow(x, addend, FORMAT: tl.constexpr):
    """fp32 as 16 bits, rounded as the addend to its bits decides; fp16's subnormal numbers always to nearest."""
    bits = x.to(tl.uint32, bitcast=True)
    if FORMAT == tl.bfloat16:
        half = tl.where(x != x, bits | 0x400000, bits + addend) >> 16
    else:
        magnitude = bits & 0x7FFFFFFF
        # The spacing of floats in [0.5, 1) is that of fp16's subnormal numbers.
        subnormal = (magnitude.to(tl.float32, bitcast=True) + 0.5).to(tl.uint32, bitcast=True) - 0x3F000000
        half = (magnitude + addend - 0x38000000) >> 13
        half = tl.where(magnitude < 0x38800000, subnormal, half)
        half = tl.where(magnitude >= 0x47800000, 0x7C00, half)
        half = tl.where(magnitude > 0x7F800000, 0x7E00 | ((magnitude >> 13) & 0x3FF), half)
        half = half | ((bits >> 16) & 0x8000)
    return half.to(tl.int16)


@triton.jit
def narrow_nearest(x, FORMAT: tl.constexpr):
    """fp32 as 16 bits, halves to even."""
    dropped: tl.constexpr = 16 if FORMAT == tl.bfloat16 else 13
    odd = (x.to(tl.uint32, bitcast=True) >> dropped) & 1
    return narrow(x, odd + ((1 << (dropped - 1)) - 1), FORMAT)


@triton.jit
def level(code, FORMAT: tl.constexpr):
    """The magnitude that a code stands for, as a fraction of the scale."""
    if FORMAT == tl.int8:
        t = tl.div_rn(code, 127.0)
        fraction = t * t
    else:
        t = tl.div_rn(code, 255.0)
        fraction = (t * t) * (t * t)
    return fraction


@triton.jit
def decode(address, scales, start, n, FORMAT: tl.constexpr, T: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr):
    """The block in the arithmetic's type T."""
    if FORMAT == tl.bfloat16 or FORMAT == tl.float16:
        value = widen(read(address, start, n, tl.int16, ALIGNED, FULL), FORMAT)
    elif FORMAT == tl.int8 or FORMAT == tl.uint8:
        code = read(address, start, n, FORMAT, ALIGNED, FULL).to(tl.float32)
        first = start + tl.arange(0, ROWS) * ROW
        scale = tl.load(scales.to(tl.pointer_type(tl.float32)) + first // ROW, mask=first < n, other=0)[:, None]
        value = scale * tl.where(code < 0, -level(code, FORMAT), level(code, FORMAT))
    else:
        value = read(address, start, n, FORMAT, ALIGNED, FULL)
    return value.to(T)


@triton.jit
def q8_codes(ratio, random, FORMAT: tl.constexpr, DRAW: tl.constexpr):
    """Codes of magnitudes, given as fractions of the scale. Drawn ones start one below the largest."""
    root = tl.sqrt_rn(ratio)
    if FORMAT == tl.int8:
        y = root * 127.0
    else:
        y = tl.sqrt_rn(root) * 255.0
    if DRAW:
        largest: tl.constexpr = 126 if FORMAT == tl.int8 else 254
        below = tl.minimum(y.to(tl.int32), largest).to(tl.float32)
        low = level(below, FORMAT)
        fraction = tl.div_rn(ratio - low, level(below + 1.0, FORMAT) - low)
        drawn = ((random & 0xFFFF).to(tl.float32) + 0.5) * (1.0 / 65536)
        code = below.to(tl.int32) + (drawn < fraction).to(tl.int32)
    else:  # halves to even: above 2^23 floats are integers
        code = (y + 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000
    return code


@triton.jit
def encode(
    address,
    scales,
    start,
    n,
    value,
    random,
    FORMAT: tl.constexpr,
    DRAW: tl.constexpr,
    ALIGNED: tl.constexpr,
    FULL: tl.constexpr,
):
    """Store the block: to nearest, or drawn from the lower 16 of `random`'s bits in bfloat16 and 8-bit formats."""
    if FORMAT == tl.bfloat16 and DRAW:
        half = narrow(value.to(tl.float32), random & 0xFFFF, FORMAT)
        write(address, start, n, half, tl.int16, ALIGNED, FULL)
    elif FORMAT == tl.bfloat16 or FORMAT == tl.float16:
        write(address, start, n, narrow_nearest(value.to(tl.float32), FORMAT), tl.int16, ALIGNED, FULL)
    elif FORMAT == tl.int8 or FORMAT == tl.uint8:
        x = value.to(tl.float32)
        magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        if not FULL:
            magnitude = tl.where(start + places() < n, magnitude, 0)
        largest = tl.max(magnitude, axis=1)
        scale = tl.where(largest >= 0x7F800000, 0x7FC00000, largest).to(tl.float32, bitcast=True)
        first = start + tl.arange(0, ROWS) * ROW
        tl.store(scales.to(tl.pointer_type(tl.float32)) + first // ROW, scale, mask=first < n)
        has_scale = (scale > 0)[:, None]  # not where all are zero, nor where one is not finite
        ratio = tl.where(has_scale, tl.div_rn(tl.abs(x), tl.where(has_scale, scale[:, None], 1.0)), 0.0)
        code = q8_codes(ratio, random, FORMAT, DRAW)
        if FORMAT == tl.int8:
            code = tl.where(x < 0, -code, code)
        else:  # a zero under a nonzero momentum would explode
            code = tl.where((code == 0) & (x > 0), 1, code)
        write(address, start, n, tl.where(has_scale, code, 0), FORMAT, ALIGNED, FULL)
    else:
        write(address, start, n, value, FORMAT, ALIGNED, FULL)


@triton.jit
def decode_weight(
    address,
    extra,
    start,
    n,
    FORMAT: tl.constexpr,
    ROUNDING: tl.constexpr,
    T: tl.constexpr,
    ALIGNED: tl.constexpr,
    FULL: tl.constexpr,
):
    """The weights that a block of parameters and its remainder stand for."""
    x = decode(address, 0, start, n, FORMAT, T, ALIGNED, FULL)
    if ROUNDING == KAHAN:
        x += decode(extra, 0, start, n, FORMAT, T, ALIGNED, FULL)
    elif ROUNDING == REMAINDER16 or ROUNDING == REMAINDER8:
        stored: tl.constexpr = tl.int16 if ROUNDING == REMAINDER16 else tl.int8
        shift: tl.constexpr = 0 if ROUNDING == REMAINDER16 else (8 if FORMAT == tl.bfloat16 else 5)
        rest = read(extra, start, n, stored, ALIGNED, FULL).to(tl.int32) << shift
        x = (x.to(tl.int32, bitcast=True) + rest).to(tl.float32, bitcast=True)
    return x


@triton.jit
def encode_weight(
    address,
    extra,
    start,
    n,
    x,
    key,
    FORMAT: tl.constexpr,
    ROUNDING: tl.constexpr,
    ALIGNED: tl.constexpr,
    FULL: tl.constexpr,
):
    """Store a block of weights, and what the parameters' format drops of them."""
    dropped: tl.constexpr = 16 if FORMAT == tl.bfloat16 else 13
    if ROUNDING == NEAREST:
        encode(address, 0, start, n, x, 0, FORMAT, False, ALIGNED, FULL)
    elif ROUNDING == STOCHASTIC:
        random = (random_bits(key ^ 0x5BD1E995, start) >> 16) & ((1 << dropped) - 1)
        write(address, start, n, narrow(x, random, FORMAT), tl.int16, ALIGNED, FULL)
    elif ROUNDING == KAHAN:
        half = narrow_nearest(x, FORMAT)
        write(address, start, n, half, tl.int16, ALIGNED, FULL)
        rest = x - widen(half, FORMAT)
        rest = tl.where(tl.abs(rest) < float("inf"), rest, 0.0)  # what is not finite has no rest
        write(extra, start, n, narrow_nearest(rest, FORMAT), tl.int16, ALIGNED, FULL)
    else:
        # Half up in magnitude, so that the difference of the bits fits; fp16's subnormal numbers saturate.
        half = narrow(x, 1 << (dropped - 1), FORMAT)
        bits, nearest = x.to(tl.int32, bitcast=True), widen(half, FORMAT).to(tl.int32, bitcast=True)
        difference = bits - nearest
        if ROUNDING == REMAINDER8:
            shift: tl.constexpr = dropped - 8
            random = (random_bits(key ^ 0x5BD1E995, start) >> 16) & ((1 << shift) - 1)
            difference = (difference + random.to(tl.int32)) >> shift
        stored: tl.constexpr = tl.int16 if ROUNDING == REMAINDER16 else tl.int8
        limit: tl.constexpr = 32767 if ROUNDING == REMAINDER16 else 127
        difference = tl.maximum(tl.minimum(difference, limit), -limit - 1)
        # A finite x that fp16 rounds to infinity has no remainder either.
        judged = (bits if FORMAT == tl.bfloat16 else nearest) & 0x7FFFFFFF
        write(address, start, n, half, tl.int16, ALIGNED, FULL)
        write(extra, start, n, tl.where(judged >= 0x7F800000, 0, difference), stored, ALIGNED, FULL)
