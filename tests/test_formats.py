"""How state and half-precision weights are stored: error bounds, expectations, and what must come back exactly."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mars_optim.state import (
    ROUNDINGS,
    complete,
    complete_remainder,
    decode,
    decode_weight,
    encode_,
    encode_weight_,
    key_of,
    random_bits,
    salt,
)

HALF = [torch.bfloat16, torch.float16]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored_as(values: Tensor, name: str, precision: str, random: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    state: dict[str, Tensor] = {}
    complete(state, torch.nn.Parameter(torch.empty_like(values)), name, precision)
    encode_(state[name], state.get(f"{name}_scale"), values, random)
    return state[name], state.get(f"{name}_scale")


def roundtrip(values: Tensor, name: str, precision: str, random: Tensor | None = None) -> Tensor:
    return decode(*stored_as(values, name, precision, random), values.dtype)


# ------------------------------------------------------------------ 8 bits, blocks of 128


@pytest.mark.parametrize("shape", [(1,), (127,), (128,), (129,), (3, 100), (0,), (5, 0)], ids=str)
@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_eight_bit_error_is_bounded_by_the_spacing(shape: tuple[int, ...], spread: float) -> None:
    """Half a spacing: |error| <= s (sqrt(y)/127 + 1/(4*127^2)) signed, s (2 y^(3/4)/255 + ...) unsigned."""
    values = randn(*shape) * torch.exp(spread * randn(*shape, seed=1))
    flat = values.flatten()
    for name in ("exp_avg", "prev_grad", "exp_avg_sq"):
        x = flat.square() if name == "exp_avg_sq" else flat
        error = (roundtrip(x.view(shape), name, "8bit").flatten() - x).abs()
        for start in range(0, len(x), 128):
            block, e = x[start : start + 128].double(), error[start : start + 128].double()
            scale = block.abs().max()
            y = block.abs() / scale
            if name == "exp_avg_sq":
                # The cell around root r = y^(1/4) is at most [r - 1/510, r + 1/510]; one code up from 0 for v > 0.
                bound = ((y**0.25 + 1 / 510) ** 4 - y).clamp(min=255.0**-4)
            else:
                bound = (y.sqrt() + 1 / 254) ** 2 - y
            assert (e <= scale * (bound + 1e-6)).all()


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_eight_bit_codes_come_back_exactly(name: str) -> None:
    codes, scale = stored_as(randn(1000).abs(), name, "8bit")
    again, scale_again = stored_as(decode(codes, scale, torch.float32), name, "8bit")
    assert torch.equal(codes, again)
    assert scale is not None
    assert scale_again is not None
    assert torch.equal(scale, scale_again)


@pytest.mark.parametrize("size", [1e-40, 1e-30, 1.0, 1e30])
def test_eight_bit_blocks_of_any_size(size: float) -> None:
    values = torch.rand(256, generator=torch.Generator().manual_seed(0)) * size + size / 10
    for name in ("exp_avg", "exp_avg_sq"):
        back = roundtrip(values, name, "8bit")
        # Half a spacing at y = 0.1: sqrt(0.1)/127 = 0.25% of the scale; subnormal scales add their own rounding.
        assert (back - values).abs().max() <= 0.013 * size + 2e-45


def test_zero_blocks_stay_zero_and_bad_blocks_stay_alone() -> None:
    values = torch.ones(384)
    values[:128] = 0
    values[200] = math.inf
    for name in ("exp_avg", "exp_avg_sq"):
        back = roundtrip(values, name, "8bit")
        assert torch.equal(back[:128], values[:128])
        assert back[128:256].isnan().all()
        assert torch.equal(back[256:], values[256:])


def test_a_second_moment_above_zero_is_never_stored_as_zero() -> None:
    v = torch.full((128,), 1e-30)
    v[0] = 1.0
    for random in (None, torch.full((128,), 0xFFFF)):
        assert (roundtrip(v, "exp_avg_sq", "8bit", random) > 0).all()


# ------------------------------------------------------------------ stochastic rounding


def sixteen_bits(seed: int, like: Tensor, *, upper: bool = False) -> Tensor:
    bits = random_bits(key_of(salt(3), seed), like)
    return bits >> 16 if upper else bits & 0xFFFF


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize(("name", "precision"), [("exp_avg", "bf16"), ("exp_avg", "8bit"), ("exp_avg_sq", "8bit")])
def test_stochastic_rounding_keeps_the_expectation(name: str, precision: str, upper: bool) -> None:
    """The mean of n roundings is off by less than 5 standard errors; they are measured beside it."""
    values = torch.linspace(0.05, 1.0, 128)
    n = 2000
    total = torch.zeros(128, dtype=torch.float64)
    spread = torch.zeros(128, dtype=torch.float64)
    for t in range(n):
        back = roundtrip(values, name, precision, sixteen_bits(t, values, upper=upper)).double()
        total += back - values
        spread += (back - values) ** 2
    standard_error = (spread / n).sqrt() / math.sqrt(n)
    # 2^-16: the granularity of the probability; 1e-6: fp32.
    assert ((total / n).abs() <= 5 * standard_error + 0.02 * 2.0**-16 + 1e-6).all()
    assert (spread > 0).sum() > 100  # it does round


def test_random_bits_are_reproducible_and_differ_between_tensors_steps_and_elements() -> None:
    like = torch.empty(1000)
    one = random_bits(key_of(salt(0), 1), like)
    assert torch.equal(one, random_bits(key_of(salt(0), torch.tensor(1.0)), like))
    assert len(one.unique()) == 1000
    for other in (key_of(salt(1), 1), key_of(salt(0), 2)):
        assert (random_bits(other, like) == one).sum() <= 1
    assert 0 <= int(one.min()) <= int(one.max()) < 2**32
    # Each of the 32 bits is set half the time: 5 standard deviations of 1000 coin tosses.
    for bit in range(32):
        assert abs(int((one >> bit & 1).sum()) - 500) < 80


# ------------------------------------------------------------------ half-precision weights


def weight_of(x: Tensor, dtype: torch.dtype, rounding: str, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(the half-precision parameter, the fp32 weight it stands for)"""
    p = torch.nn.Parameter(torch.zeros_like(x, dtype=dtype))
    state: dict[str, Tensor] = {}
    complete_remainder(state, p, rounding)
    rest = state.get("param_remainder")
    with torch.no_grad():
        encode_weight_(p, rest, x, random)
    return p.detach(), decode_weight(p.detach(), rest)


# Relative error of the weight that is kept, in units of 2^-k; the sign bit of the remainder gives one bit more.
BITS = {
    (torch.bfloat16, "nearest"): 9,
    (torch.bfloat16, "stochastic"): 8,
    (torch.bfloat16, "kahan"): 17,
    (torch.bfloat16, "remainder8"): 15,
    (torch.bfloat16, "remainder16"): 24,
    (torch.float16, "nearest"): 11,
    (torch.float16, "stochastic"): 10,
    (torch.float16, "kahan"): 21,
    (torch.float16, "remainder8"): 18,
    (torch.float16, "remainder16"): 24,
}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_the_weight_kept_is_this_close(dtype: torch.dtype, rounding: str) -> None:
    x = randn(4000) * 3
    random = sixteen_bits(1, x) if rounding in ("stochastic", "remainder8") else None
    p, kept = weight_of(x, dtype, rounding, random)
    ulp = 2.0 ** torch.floor(torch.log2(x.abs())) * 2.0  # twice the binade: bounds a half spacing generously
    limit = 0 if rounding == "remainder16" else 2.0 ** -BITS[dtype, rounding]
    if dtype == torch.float16:
        x, p, kept, ulp = (t[x.abs() > 2.0**-7] for t in (x, p, kept, ulp))  # away from its subnormal numbers
        limit += 2.0**-18 if rounding == "kahan" else 0  # where the remainder itself may be
    assert ((kept - x).abs() <= limit * ulp).all()
    # The parameter is the weight rounded, not the rest: within one spacing of it.
    assert ((p.float() - x).abs() <= torch.finfo(dtype).eps * x.abs() + 2.0**-24).all()


def test_sixteen_bits_of_remainder_under_bfloat16_are_the_fp32_weight() -> None:
    x = torch.cat([randn(5000), randn(100) * 1e-38, randn(100) * 1e38, torch.tensor([0.0, -0.0, 1e-45])])
    _, kept = weight_of(x, torch.bfloat16, "remainder16")
    assert torch.equal(kept.view(torch.int32), x.view(torch.int32))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_weights_that_are_not_finite_show_it(dtype: torch.dtype, rounding: str) -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan, 1.0])
    random = sixteen_bits(0, x) if rounding in ("stochastic", "remainder8") else None
    p, kept = weight_of(x, dtype, rounding, random)
    for t in (p.float(), kept):
        assert torch.equal(t.isnan(), x.isnan())
        assert torch.equal(t.nan_to_num(), x.to(dtype).float().nan_to_num()) or torch.equal(t[:2], x[:2])


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("rounding", ["stochastic", "remainder8"])
def test_rounding_weights_keeps_the_expectation(dtype: torch.dtype, rounding: str) -> None:
    x = torch.linspace(0.5, 2.0, 64)
    n = 3000
    total, spread = torch.zeros(64, dtype=torch.float64), torch.zeros(64, dtype=torch.float64)
    for t in range(n):
        _, kept = weight_of(x, dtype, rounding, random_bits(key_of(salt(0), t), x))
        total += kept.double() - x
        spread += (kept.double() - x) ** 2
    assert ((total / n).abs() <= 5 * (spread / n).sqrt() / math.sqrt(n) + 1e-9).all()


@pytest.mark.parametrize("before", ROUNDINGS)
@pytest.mark.parametrize("after", ROUNDINGS)
def test_remainders_convert_into_each_other(before: str, after: str) -> None:
    x = randn(1000)
    p = torch.nn.Parameter(torch.zeros_like(x, dtype=torch.bfloat16))
    state: dict[str, Tensor] = {}
    complete_remainder(state, p, before)
    with torch.no_grad():
        encode_weight_(p, state.get("param_remainder"), x)
    shown = p.detach().clone()
    complete_remainder(state, p, after)
    assert torch.equal(p, shown)
    kept = decode_weight(p.detach(), state.get("param_remainder"))
    rough = "nearest" if "nearest" in (before, after) or "stochastic" in (before, after) else "remainder8"
    assert ((kept - x).abs() <= 2.0 ** -(BITS[torch.bfloat16, rough] - 1) * x.abs()).all()
