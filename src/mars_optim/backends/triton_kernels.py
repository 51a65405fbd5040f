"""The step in Triton, over all tensors of a batch in each launch: that of native/csrc/steps.h and norms.h.

`table` has a column of `count` 64-bit words for each name in `COLUMNS`; `blocks` says on which tensor, and which block
of it, a program works; `records` holds each tensor's `NUMBERS`, which `prepare` computes in float64 from what the host
and the device know. Such a number comes as the bits of a double, as a pointer to one value or as a pointer to one
value a tensor: 0, 1 or 2 in the two bits of `KINDS` at its place.
"""
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from .native_library import Op
from .triton_codecs import BLOCK, FORMATS, NUM_WARPS, decode, decode_weight, encode, encode_weight, random_bits

__all__ = ["FORMATS", "NUMBERS", "NUM_WARPS", "add_products", "descend", "measure", "prepare", "update"]

COLUMNS = (
    *("n", "x", "extra", "g", "prev", "prev_scale", "next", "next_scale", "m", "m_scale", "v", "v_scale"),
    *("vmax", "vmax_scale", "out", "salt", "step", "first_block", "update_scale"),
)
# fmt: off
(AT_N, AT_X, AT_EXTRA, AT_G, AT_PREV, AT_PREV_SCALE, AT_NEXT, AT_NEXT_SCALE, AT_M, AT_M_SCALE, AT_V, AT_V_SCALE,
 AT_VMAX, AT_VMAX_SCALE, AT_OUT, AT_SALT, AT_STEP, AT_FIRST, AT_UPDATE_SCALE) = map(tl.constexpr, range(len(COLUMNS)))
NUMBERS = ("a", "b", "clip", "we", "wg", "decay", "step_size", "inv_sqrt_bias2", "beta1", "rest1", "beta2", "rest2",
           "eps", "t")
(N_A, N_B, N_CLIP, N_WE, N_WG, N_DECAY, N_STEP_SIZE, N_INV_SQRT_BIAS2, N_BETA1, N_REST1, N_BETA2, N_REST2, N_EPS,
 N_T) = map(tl.constexpr, range(len(NUMBERS)))
# fmt: on
NUM_NUMBERS = tl.constexpr(len(NUMBERS))
LANES = tl.constexpr(4096)  # partial sums that one program adds at a time
ADAMW, LION, MOMENTUM, DESCEND = (tl.constexpr(int(op)) for op in (Op.ADAMW, Op.LION, Op.MOMENTUM, Op.DESCEND))


@triton.jit
def number(value, i, KINDS: tl.constexpr, PLACE: tl.constexpr):
    """A number of tensor i, in float64."""
    KIND: tl.constexpr = (KINDS >> (2 * PLACE)) & 3
    if KIND == 0:
        result = value.to(tl.int64).to(tl.float64, bitcast=True)
    elif KIND == 1:
        result = tl.load(value).to(tl.float64)
    else:
        result = tl.load(value + i).to(tl.float64)
    return result


@triton.jit
def total(partial, first, last, WIDTH: tl.constexpr, k):
    """The sum of the k-th of WIDTH partial sums over blocks first to last, always in the same order."""
    sums = tl.zeros((LANES,), tl.float64)
    while first < last:
        block = first + tl.arange(0, LANES)
        sums += tl.load(partial + block * WIDTH + k, mask=block < last, other=0.0)
        first += LANES
    return tl.sum(sums, axis=0)


@triton.jit
def key_of(row, count, r):
    """The key of this step's random numbers, as `mars_optim.state.key_of` has it."""
    step = tl.load(r + N_T).to(tl.int64).to(tl.uint32)
    return tl.load(row + AT_SALT * count).to(tl.uint32) ^ (step * 0x85EBCA77)


@triton.jit
def sum_of(block):
    """The sum of a block's elements."""
    return tl.sum(tl.sum(block, axis=1), axis=0)


@triton.jit
def corrected(g, prev, a, b, HAS_PREV: tl.constexpr):
    """c = a g + b (g - g'); where b is 0 nothing of g' counts, be it nan."""
    c = a * g
    if HAS_PREV:
        c += tl.where(b == 0, 0.0, b * (g - prev))
    return c


@triton.jit
def measure_block(row, count, start, n, a, b, sums, PRODUCTS: tl.constexpr, HAS_PREV: tl.constexpr, T: tl.constexpr,
                  G: tl.constexpr, PREV: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr):  # fmt: skip
    """Store a block's sums of g g, g g' and g' g', or of c c alone; products of fp32 are exact in float64."""
    g = decode(tl.load(row + AT_G * count), 0, start, n, G, T, ALIGNED, FULL)
    prev = tl.zeros_like(g)
    if HAS_PREV:
        scales = tl.load(row + AT_PREV_SCALE * count)
        prev = decode(tl.load(row + AT_PREV * count), scales, start, n, PREV, T, ALIGNED, FULL)
    if PRODUCTS:
        wide, other = g.to(tl.float64), prev.to(tl.float64)
        tl.store(sums, sum_of(wide * wide))
        tl.store(sums + 1, sum_of(wide * other))
        tl.store(sums + 2, sum_of(other * other))
    else:
        c = corrected(g, prev, a, b, HAS_PREV).to(tl.float64)
        tl.store(sums, sum_of(c * c))


@triton.jit(do_not_specialize=["count", "grad_weight", "difference_weight", "ratio"])
def measure(blocks, table, partial, count, grad_weight, difference_weight, ratio, KINDS: tl.constexpr,
            PRODUCTS: tl.constexpr, HAS_PREV: tl.constexpr, T: tl.constexpr, G: tl.constexpr, PREV: tl.constexpr,
            ALIGNED: tl.constexpr):  # fmt: skip
    """The partial sums of one block: three where PRODUCTS, else one."""
    block = tl.program_id(0)
    i = tl.load(blocks + 2 * block)
    start = tl.load(blocks + 2 * block + 1).to(tl.int64) * BLOCK
    row = table + i
    n = tl.load(row + AT_N * count)
    difference = number(difference_weight, i, KINDS, 1)
    a = (number(grad_weight, i, KINDS, 0) + difference * (number(ratio, i, KINDS, 2) - 1.0)).to(T)
    b = difference.to(T)
    sums = partial + block * (3 if PRODUCTS else 1)
    if start + BLOCK <= n:
        measure_block(row, count, start, n, a, b, sums, PRODUCTS, HAS_PREV, T, G, PREV, ALIGNED, True)
    else:
        measure_block(row, count, start, n, a, b, sums, PRODUCTS, HAS_PREV, T, G, PREV, ALIGNED, False)


@triton.jit(do_not_specialize=["count"])
def add_products(table, partial, sums, count):
    """One tensor's three sums."""
    i = tl.program_id(0)
    first = tl.load(table + AT_FIRST * count + i)
    last = first + tl.cdiv(tl.load(table + AT_N * count + i), BLOCK)
    for k in tl.static_range(3):
        tl.store(sums + 3 * i + k, total(partial, first, last, 3, k))


_HOST_NUMBERS = [
    *("grad_weight", "difference_weight", "ratio", "clip", "average_weight", "new_weight", "lr", "step"),
    *("clip_norm", "weight_decay", "beta1", "beta2", "eps"),
]


@triton.jit(do_not_specialize=["count", *_HOST_NUMBERS])
def prepare(table, partial, records, count, grad_weight, difference_weight, ratio, clip, average_weight, new_weight,
            lr, step, clip_norm, weight_decay, beta1, beta2, eps, KINDS: tl.constexpr, OP: tl.constexpr,
            CLIPS: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    """One tensor's record. CLIPS: the clip follows from the partial sums. STEP: the type of steps at addresses."""
    i = tl.program_id(0)
    row = table + i
    r = records + i * NUM_NUMBERS
    rate = number(lr, i, KINDS, 6)
    step_size = rate * tl.load(row + AT_UPDATE_SCALE * count).to(tl.float64, bitcast=True)
    if STEP is None:
        t = number(step, i, KINDS, 7)
    else:
        t = tl.load(tl.load(row + AT_STEP * count).to(tl.pointer_type(STEP))).to(tl.float64)
    tl.store(r + N_T, t)
    if OP != DESCEND:
        decay1, decay2 = number(beta1, i, KINDS, 10), number(beta2, i, KINDS, 11)
        if OP == ADAMW:
            step_size = step_size / (1.0 - tl.exp2(t * tl.log2(decay1)))
            tl.store(r + N_INV_SQRT_BIAS2, 1.0 / tl.sqrt(1.0 - tl.exp2(t * tl.log2(decay2))))
        b = number(difference_weight, i, KINDS, 1)
        tl.store(r + N_A, number(grad_weight, i, KINDS, 0) + b * (number(ratio, i, KINDS, 2) - 1.0))
        tl.store(r + N_B, b)
        scale = number(clip, i, KINDS, 3)
        if CLIPS:
            first = tl.load(row + AT_FIRST * count)
            last = first + tl.cdiv(tl.load(row + AT_N * count), BLOCK)
            norm, largest = tl.sqrt(total(partial, first, last, 1, 0)), number(clip_norm, i, KINDS, 8)
            scale = tl.where(norm <= largest, 1.0, largest / norm)
        tl.store(r + N_CLIP, scale)
        tl.store(r + N_WE, number(average_weight, i, KINDS, 4))
        tl.store(r + N_WG, number(new_weight, i, KINDS, 5))
        tl.store(r + N_BETA1, decay1)
        tl.store(r + N_REST1, 1.0 - decay1)
        tl.store(r + N_BETA2, decay2)
        tl.store(r + N_REST2, 1.0 - decay2)
        tl.store(r + N_EPS, number(eps, i, KINDS, 12))
    tl.store(r + N_DECAY, 1.0 - rate * number(weight_decay, i, KINDS, 9))
    tl.store(r + N_STEP_SIZE, step_size)


@triton.jit
def adamw_direction(m, v, r):
    """m / (sqrt(v) / sqrt(1 - beta2^t) + eps); fp32 division and root are rounded as IEEE asks only by these names."""
    factor, eps = tl.load(r + N_INV_SQRT_BIAS2), tl.load(r + N_EPS)
    if m.dtype == tl.float32:
        direction = tl.div_rn(m, tl.sqrt_rn(v) * factor + eps)
    else:
        direction = m / (tl.sqrt(v) * factor + eps)
    return direction


@triton.jit
def step_block(row, count, r, start, n, OP: tl.constexpr, T: tl.constexpr, X: tl.constexpr, G: tl.constexpr,
               PREV: tl.constexpr, M: tl.constexpr, V: tl.constexpr, OUT: tl.constexpr, ROUNDING: tl.constexpr,
               HAS_PREV: tl.constexpr, KEEPS: tl.constexpr, ONE_BUFFER: tl.constexpr, AMSGRAD: tl.constexpr,
               DRAWS: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr):  # fmt: skip
    """One block's step."""
    g = decode(tl.load(row + AT_G * count), 0, start, n, G, T, ALIGNED, FULL)
    prev = g
    if HAS_PREV:
        scales = tl.load(row + AT_PREV_SCALE * count)
        prev = decode(tl.load(row + AT_PREV * count), scales, start, n, PREV, T, ALIGNED, FULL)
    c = tl.load(r + N_CLIP) * corrected(g, prev, tl.load(r + N_A), tl.load(r + N_B), HAS_PREV)
    m_at, m_scale = tl.load(row + AT_M * count), tl.load(row + AT_M_SCALE * count)
    m = decode(m_at, m_scale, start, n, M, T, ALIGNED, FULL)
    m = tl.load(r + N_BETA1) * m + tl.load(r + N_REST1) * c
    direction = m
    if ONE_BUFFER:
        direction = tl.load(r + N_WE) * m + tl.load(r + N_WG) * g
    v_at, v_scale = tl.load(row + AT_V * count), tl.load(row + AT_V_SCALE * count)
    vmax_at, vmax_scale = tl.load(row + AT_VMAX * count), tl.load(row + AT_VMAX_SCALE * count)
    v, largest = g, g
    if OP == ADAMW:
        v = decode(v_at, v_scale, start, n, V, T, ALIGNED, FULL)
        v = tl.load(r + N_BETA2) * v + tl.load(r + N_REST2) * (c * c)
        largest = v
        if AMSGRAD:
            before = decode(vmax_at, vmax_scale, start, n, V, T, ALIGNED, FULL)
            largest = tl.where((before >= v) | (before != before), before, v)  # nan if either is
        direction = adamw_direction(m, largest, r)
    elif OP == LION:  # zeros and nan are their own
        direction = tl.where(direction > 0, 1.0, tl.where(direction < 0, -1.0, direction))
    key = key_of(row, count, r)
    if OP != MOMENTUM:
        descend_block(row, count, r, start, n, direction, key, T, X, ROUNDING, ALIGNED, FULL)
    random = key
    if DRAWS:
        random = random_bits(key, start)
    tl.debug_barrier()  # scales and g' are read by threads that need not be those which write them
    encode(m_at, m_scale, start, n, m, random, M, DRAWS, ALIGNED, FULL)
    if OP == ADAMW:
        encode(v_at, v_scale, start, n, v, random >> 16, V, DRAWS, ALIGNED, FULL)
        if AMSGRAD:
            encode(vmax_at, vmax_scale, start, n, largest, random, V, False, ALIGNED, FULL)
    if OP == MOMENTUM and OUT is not None:
        encode(tl.load(row + AT_OUT * count), 0, start, n, direction, random, OUT, False, ALIGNED, FULL)
    if KEEPS:
        scales = tl.load(row + AT_NEXT_SCALE * count)
        encode(tl.load(row + AT_NEXT * count), scales, start, n, g, random, PREV, False, ALIGNED, FULL)


@triton.jit
def descend_block(row, count, r, start, n, direction, key, T: tl.constexpr, X: tl.constexpr, ROUNDING: tl.constexpr,
                  ALIGNED: tl.constexpr, FULL: tl.constexpr):  # fmt: skip
    """x <- decay x - step_size direction."""
    at, extra = tl.load(row + AT_X * count), tl.load(row + AT_EXTRA * count)
    x = decode_weight(at, extra, start, n, X, ROUNDING, T, ALIGNED, FULL)
    x = tl.load(r + N_DECAY) * x - tl.load(r + N_STEP_SIZE) * direction
    tl.debug_barrier()
    encode_weight(at, extra, start, n, x, key, X, ROUNDING, ALIGNED, FULL)


@triton.jit(do_not_specialize=["count"])
def update(blocks, table, records, found_inf, count, T: tl.constexpr, OP: tl.constexpr, X: tl.constexpr,
           G: tl.constexpr, PREV: tl.constexpr, M: tl.constexpr, V: tl.constexpr, OUT: tl.constexpr,
           ROUNDING: tl.constexpr, HAS_PREV: tl.constexpr, KEEPS: tl.constexpr, ONE_BUFFER: tl.constexpr,
           AMSGRAD: tl.constexpr, DRAWS: tl.constexpr, SKIPS: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    """One block's step, or nothing at all where SKIPS and `found_inf` is not 0."""
    block = tl.program_id(0)
    i = tl.load(blocks + 2 * block)
    start = tl.load(blocks + 2 * block + 1).to(tl.int64) * BLOCK
    row = table + i
    r = records + i * NUM_NUMBERS
    n = tl.load(row + AT_N * count)
    if SKIPS:
        n = tl.where(tl.load(found_inf) != 0, 0, n)
    if start + BLOCK <= n:
        step_block(row, count, r, start, n, OP, T, X, G, PREV, M, V, OUT, ROUNDING, HAS_PREV, KEEPS, ONE_BUFFER,
                   AMSGRAD, DRAWS, ALIGNED, True)  # fmt: skip
    else:
        step_block(row, count, r, start, n, OP, T, X, G, PREV, M, V, OUT, ROUNDING, HAS_PREV, KEEPS, ONE_BUFFER,
                   AMSGRAD, DRAWS, ALIGNED, False)  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def descend(blocks, table, records, found_inf, count, T: tl.constexpr, X: tl.constexpr, OUT: tl.constexpr,
            ROUNDING: tl.constexpr, SKIPS: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    """One block's step along given directions."""
    block = tl.program_id(0)
    i = tl.load(blocks + 2 * block)
    start = tl.load(blocks + 2 * block + 1).to(tl.int64) * BLOCK
    row = table + i
    r = records + i * NUM_NUMBERS
    n = tl.load(row + AT_N * count)
    if SKIPS:
        n = tl.where(tl.load(found_inf) != 0, 0, n)
    key = key_of(row, count, r)
    if start + BLOCK <= n:
        direction = decode(tl.load(row + AT_OUT * count), 0, start, n, OUT, T, ALIGNED, True)
        descend_block(row, count, r, start, n, direction, key, T, X, ROUNDING, ALIGNED, True)
    else:
        direction = decode(tl.load(row + AT_OUT * count), 0, start, n, OUT, T, ALIGNED, False)
        descend_block(row, count, r, start, n, direction, key, T, X, ROUNDING, ALIGNED, False)
