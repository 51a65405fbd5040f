from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from array import array
from typing import Any

import numpy as np
import pytest
import torch

from mars_optim.backends import native_library as native
from mars_optim.backends.native_library import Flag, Format, Op, Rounding
from mars_optim.native import Isa, NativeUnavailable, library
from native_oracle import (
    PLAIN,
    Operand,
    bf16_drawn,
    bf16_nearest,
    bf16_value,
    bits,
    f32,
    from_bits,
    q8_decode,
    q8_encode,
    random_bits,
    run,
    step,
)

try:
    LEVELS = bin(native.load().handle.mars_isa_levels()).count("1")
    LIBRARIES = [native.load(isa) for isa in list(Isa)[:LEVELS]]
except NativeUnavailable as unavailable:  # pragma: no cover
    pytest.skip(str(unavailable), allow_module_level=True)

SIZES = [0, 1, 7, 127, 128, 129, 1000, 70001]
NUMBERS = {"a": 0.8, "b": 0.4, "ratio": 0.7, "decay": 0.999, "step_size": 0.01, "inv_sqrt_bias2": 3.0, "key": 1234567}
DRAWN = Flag.STOCHASTIC_M | Flag.STOCHASTIC_V
each_library = pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.isa.name)


def values(n: int, seed: int, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(n) * scale


def operands(n, x=Format.F32, m=None, v=None, prev=None, g=None, seed=0, vmax=False, out=None) -> dict:
    """A tensor's operands, by default stored as the arithmetic's type."""
    plain = Format.F64 if x == Format.F64 else Format.F32
    g, m, v = (plain if fmt is None else fmt for fmt in (g, m, v))
    t: dict = {"x": Operand(x, values(n, seed)), "g": Operand(g, values(n, seed + 1))}
    t["m"] = Operand(m, values(n, seed + 2, 0.1))
    t["v"] = Operand(v, values(n, seed + 3, 0.1) ** 2, signed=False)
    if prev != "none":
        t["prev"] = Operand(plain if prev is None else prev, values(n, seed + 4))
    if vmax:
        t["vmax"] = Operand(v, values(n, seed + 5, 0.2) ** 2, signed=False)
    if out is not None:
        t["out"] = Operand(out, values(n, seed + 6))
    return t


def awkward(n: int) -> np.ndarray:
    """fp32 of every magnitude, some ties, no nan or inf."""
    rng = np.random.default_rng(7)
    x = from_bits(rng.integers(0, 2**32, n))
    x = np.where(np.isfinite(x), x, f32(1.5))
    x[: n // 4] = from_bits(bits(x[: n // 4]) & ~0xFFFF | 0x8000)  # between two bf16
    x[n // 4 : n // 2] = rng.standard_normal(n // 2 - n // 4).astype(np.float16) * f32(1 + 2**-11)
    return x


# Gradients after a usual one, which the kernels take as a promise that they may update before the norm is known.
SURPRISES = ["none", "longer", "far longer", "spike", "spike at the end", "spike without history", "spikes", "nan"]


def surprise(what: str, n: int, plain: Format = Format.F32, seed: int = 3, **formats: Any) -> tuple[dict, float]:
    """A tensor's record with the norm of its previous gradient, and the clip norm; in bf16 g is kept beside g'."""
    t = operands(n, plain, seed=seed, **formats)
    history = Operand(t["v"].format, t["v"].values + t["m"].values ** 2, signed=False)  # of both moments
    t["v"].data[:] = history.data
    if t["prev"].format == Format.BF16:
        t["next"] = Operand(Format.BF16, np.zeros(n), aligned=True)
    g = t["g"].data
    if what == "longer":
        g *= 3
    elif what == "far longer":
        g *= 1000
    elif what.startswith("spike ") or what == "spike":
        g[max(n - 5, 0) if what.endswith("end") else n // 2] = 1e6
    elif what == "nan":
        g[n // 3] = np.nan
    if what == "spike without history":
        t["m"].data[:] = t["v"].data[:] = 0
    prev_norm = float(np.linalg.norm(t["prev"].values.astype(np.float64)))
    if what == "spikes":  # one that stops the updates, but needs no clip, and one after it
        g[n // 2], g[min(n // 2 + 1000, n - 1)] = 0.7 * prev_norm, 1e6
    return {**t, **NUMBERS, "prev_norm": prev_norm}, 2.0 * prev_norm


# The arithmetic, in formats that do not round.


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("plain", [Format.F32, Format.F64], ids=lambda f: f.name)
@pytest.mark.parametrize("clip_norm", [0.0, 0.7, 1e9], ids=["unclipped", "clipped", "unreached"])
@pytest.mark.parametrize(
    ("op", "flags"),
    [
        (Op.ADAMW, Flag(0)),
        (Op.ADAMW, Flag.AMSGRAD),
        (Op.LION, Flag(0)),
        (Op.LION, Flag.ONE_BUFFER),
        (Op.MOMENTUM, Flag(0)),
        (Op.MOMENTUM, Flag.ONE_BUFFER),
        (Op.DESCEND, Flag(0)),
    ],
    ids=str,
)
def test_steps(op, flags, clip_norm, plain, n):
    for prev in (None, "none"):
        t = operands(n, plain, vmax=True, out=plain, prev=prev)
        numbers = {**NUMBERS, "we": 0.7, "wg": 0.2}
        want = step(op, {k: o.values for k, o in t.items()}, flags=flags, clip_norm=clip_norm, **numbers)
        run(op, [{**t, **numbers}], flags=flags, clip_norm=clip_norm, threads=2)
        tolerance = 1e-13 if plain == Format.F64 else 3e-6  # a few roundings of numbers near 1
        for name, operand in t.items():
            if op == Op.LION and name == "x":  # a momentum near 0 may have either sign
                assert (np.abs(operand.values - want[name]) > tolerance).mean() < 1e-3 if n else True
            else:
                np.testing.assert_allclose(operand.values, want[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("n", [1, 1000, 70001, 300_001])
@pytest.mark.parametrize("plain", [Format.F32, Format.F64], ids=lambda f: f.name)
@pytest.mark.parametrize("what", SURPRISES)
@pytest.mark.parametrize("op", [Op.ADAMW, Op.LION], ids=str)
def test_updates_before_the_norm_is_known(op, what, plain, n):
    t, clip_norm = surprise(what, n, plain)
    before = {name: o.values.copy() for name, o in t.items() if isinstance(o, Operand)}
    want = step(op, before, clip_norm=clip_norm, **NUMBERS)
    run(op, [t], clip_norm=clip_norm, threads=2)
    if what == "nan":
        assert np.isnan(t["x"].values).all()
        assert np.isnan(t["m"].values).all()
        return
    # A few roundings of what was added before the norm was known, not of the little that a clip leaves of it.
    few, size = 8 * np.finfo(t["x"].data.dtype).eps, np.abs(before["g"]) + np.abs(before["prev"])
    assert (np.abs(t["m"].values - want["m"]) <= few * (np.abs(before["m"]) + 0.1 * size)).all()
    off = np.abs(t["x"].values - want["x"])
    if op == Op.LION:  # a momentum near 0 may have either sign
        assert (off > few).mean() <= 1e-3
    else:
        assert (np.abs(t["v"].values - want["v"]) <= few * (before["v"] + 0.01 * size**2)).all()
        assert off.max() <= 100 * few
        if what == "spikes":  # the first was updated at once, and its v keeps a rounding of c^2: within the line above
            off[n // 2] = 0
        assert (off > few).mean() <= 1e-5


# How moments and previous gradient are stored where a step can be amended.
NARROW = [
    {"m": Format.BF16, "v": Format.BF16, "prev": Format.BF16},
    {"m": Format.BF16, "v": Format.BF16},
    {"prev": Format.BF16},
]


@each_library
@pytest.mark.parametrize("n", [1, 1000, 70001, 300_001])
@pytest.mark.parametrize("formats", NARROW, ids=lambda formats: "-".join(formats))
@pytest.mark.parametrize("what", SURPRISES)
@pytest.mark.parametrize("op", [Op.ADAMW, Op.LION], ids=str)
def test_narrow_state_is_amended_to_within_its_spacing(op, what, formats, n, library):
    t, clip_norm = surprise(what, n, **formats)
    before = {name: o.values.copy() for name, o in t.items() if isinstance(o, Operand)}
    want = step(op, before, clip_norm=clip_norm, **NUMBERS)
    run(op, [t], clip_norm=clip_norm, threads=2, flags=DRAWN, library=library)
    if "prev" in formats:
        np.testing.assert_array_equal(t["next"].values, bf16_value(bf16_nearest(before["g"])))
        np.testing.assert_array_equal(t["prev"].values, before["prev"])
    if what == "nan":
        assert np.isnan(t["m"].values[n // 3])
        assert np.isnan(t["x"].values).all()
        return
    # Stored in bf16 the moments are drawn twice, the first time with all of c in them.
    spacing = {Format.BF16: 2**-6, Format.F32: 1e-6}[t["m"].format]
    size = np.abs(before["g"]) + np.abs(before["prev"])
    m_off = spacing * (np.abs(before["m"]) + 0.1 * size)
    assert (np.abs(t["m"].values - want["m"]) <= m_off).all()
    off = np.abs(t["x"].values - want["x"])
    if op == Op.LION:  # a momentum near 0 may have either sign
        assert (off[np.abs(want["m"]) > m_off] <= 1e-5).all()
    else:
        assert (np.abs(t["v"].values - want["v"]) <= spacing * (before["v"] + 0.01 * size**2)).all()
        # Where v is lost in the rounding of c^2 (g is ten times its history here, so this is seen), the step is too
        # short; the longest is that of one gradient.
        longest = NUMBERS["step_size"] * 0.1 / (0.01**0.5 * NUMBERS["inv_sqrt_bias2"])
        is_strong = what.startswith(("spike", "far")) and t["m"].format == Format.BF16
        assert (off > 1e-5 + spacing * longest).mean() <= (0.03 if is_strong and "without" not in what else 1e-5)
        assert off.max() <= 2 * longest


@pytest.mark.parametrize("op", [Op.ADAMW, Op.LION], ids=str)
def test_amended_moments_in_bf16_are_right_on_average(op):
    n, draws = 1500, 400
    t, clip_norm = surprise("longer", n, **NARROW[0])
    before = {name: o.values.copy() for name, o in t.items() if isinstance(o, Operand)}
    want = step(op, before, clip_norm=clip_norm, **NUMBERS)
    sums = {name: np.zeros(n) for name in ("m", "v")}
    for key in range(draws):
        t, _ = surprise("longer", n, **NARROW[0])
        run(op, [{**t, "key": 7919 * key}], clip_norm=clip_norm, flags=DRAWN)
        for name in sums:
            sums[name] += t[name].values
    size = np.abs(before["g"]) + np.abs(before["prev"])
    spacings = {"m": 2**-7 * (np.abs(before["m"]) + 0.1 * size), "v": 2**-7 * (before["v"] + 0.01 * size**2)}
    for name in ("m", "v") if op == Op.ADAMW else ("m",):
        bias = (sums[name] / draws - want[name]) / spacings[name]
        if name == "v":  # of what is less than that, a spacing is left
            assert bias.max() <= 1.5
            bias = bias[before["v"] > 2 * spacings["v"]]
        assert np.abs(bias).max() <= 4.5 / draws**0.5  # of errors of at most a spacing
        assert abs(bias.mean()) <= 4.5 / (n * draws) ** 0.5 + 1e-3  # of rounding in fp32


@pytest.mark.parametrize("n", [31, 70001])
@pytest.mark.parametrize("what", ["none", "longer"])
@pytest.mark.parametrize("op", [Op.ADAMW, Op.LION], ids=str)
def test_where_the_next_previous_gradient_goes(op, what, n):
    """To an aligned address, past the cache; to any other; over g', which is measured first then."""
    results = {}
    for place in ("aligned", "anywhere", "over"):
        t, clip_norm = surprise(what, n, **NARROW[0])
        t["next"] = {"anywhere": Operand(Format.BF16, np.zeros(n)), "over": t["prev"]}.get(place, t["next"])
        before = {name: o.values.copy() for name, o in t.items() if isinstance(o, Operand)}
        run(op, [t], clip_norm=clip_norm, flags=DRAWN)
        results[place] = [t[name].data for name in ("x", "m", "v", "next")]
        np.testing.assert_array_equal(t["next"].values, bf16_value(bf16_nearest(before["g"])))
    assert_equal_bits(results["aligned"], results["anywhere"])
    want = step(op, before, clip_norm=clip_norm, **NUMBERS)
    off = np.abs(results["over"][0] - want["x"])
    assert (off > 1e-5).sum() <= (n * 1e-3 if op == Op.LION else 0)  # a momentum near 0 may have either sign


def test_next_previous_gradients_take_the_places_of_others():
    """Each large tensor writes over the g' of the one that came before it, be it in the window before or long ago."""
    sizes = [150_000, 150_000, 1000, 140_001, 31, 150_000, 131_072, 140_001, 5, 150_000]
    for what in ("none", "longer", "spike"):
        alone, together, others = (
            [surprise(what, n, seed=10 * i, **NARROW[0])[0] for i, n in enumerate(sizes)] for _ in range(3)
        )
        known = max(t["prev_norm"] for t in alone)
        for tensors in (alone, together, others):
            tensors[5]["prev_norm"] = np.inf  # known to nobody: c is measured first
        wanted_next = [bf16_nearest(t["g"].values) for t in alone]
        options = {"clip_norm": 2.0 * known, "flags": DRAWN}
        for t in alone:
            run(Op.ADAMW, [t], **options)
        for tensors, threads in ((together, 1), (others, 3)):
            last: dict[int, Operand] = {}
            for t in reversed(tensors):
                n = len(t["g"].data)
                if n >= native.WINDOW:
                    t["next"] = last.get(n, t["next"])
                    last[n] = t["prev"]
            run(Op.ADAMW, tensors, threads=threads, **options)
            for t, want, kept in zip(tensors, alone, wanted_next, strict=True):
                for name in ("x", "m", "v"):
                    np.testing.assert_array_equal(t[name].data, want[name].data)
                np.testing.assert_array_equal(t["next"].data, kept)


@pytest.mark.parametrize("n", [1000, 140_000])
def test_what_is_read_later_is_not_written_over(n):
    first, second = (surprise("none", n, seed=i, **NARROW[0])[0] for i in range(2))
    if n < native.WINDOW:  # both are measured before any of them is updated
        first["next"] = second["prev"]
    else:
        second["next"] = first["prev"]
    before = [t[name].data.copy() for t in (first, second) for name in ("x", "m", "v", "prev", "next")]
    with pytest.raises(RuntimeError, match="a `next` is a `prev` that is not read before"):
        run(Op.ADAMW, [first, second], clip_norm=1.0, flags=DRAWN)
    after = [t[name].data for t in (first, second) for name in ("x", "m", "v", "prev", "next")]
    assert_equal_bits(after, before)


@pytest.mark.parametrize("spike", [1e6, 1e15])
@pytest.mark.parametrize("history", [1e-9, 1e-5])
def test_a_history_too_short_for_its_digits_leaves_numbers(history, spike):
    """v is far below what the update put in and took away again: no root of a negative number, no long step.

    Of the larger spike's clip nothing is left of c elsewhere, so that a v of 0 would stay one.
    """
    t, clip_norm = surprise("none", 70001)
    t["g"].data[-5] = spike
    t["m"].data[:], t["v"].data[:] = history, history**2
    want = step(Op.ADAMW, {k: o.values for k, o in t.items() if isinstance(o, Operand)}, clip_norm=clip_norm, **NUMBERS)
    still = NUMBERS["decay"] * t["x"].values
    run(Op.ADAMW, [t], clip_norm=clip_norm)
    assert (t["v"].values >= 0).all()
    assert np.abs(t["x"].values - still).max() <= 1.05 * np.abs(want["x"] - still).max()


def test_without_surprise_the_bits_are_those_of_a_measured_norm():
    for op in (Op.ADAMW, Op.LION):
        (t, clip_norm), (other, _) = (surprise("none", 150_001) for _ in range(2))
        run(op, [t], clip_norm=clip_norm, threads=2)
        run(op, [{**other, "prev_norm": np.inf}], clip_norm=clip_norm, threads=2)
        for name in ("x", "m", "v"):
            np.testing.assert_array_equal(t[name].data, other[name].data)


def test_a_longer_gradient_was_amended():
    """Its roundings show it; without them nothing would tell whether tensors are read once."""
    for op in (Op.ADAMW, Op.LION):
        (t, clip_norm), (other, _) = (surprise("longer", 150_001) for _ in range(2))
        run(op, [t], clip_norm=clip_norm)
        run(op, [{**other, "prev_norm": np.inf}], clip_norm=clip_norm)
        assert (t["m"].data != other["m"].data).any()


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("fmt", [Format.F32, Format.F64, Format.BF16], ids=lambda f: f.name)
def test_products(fmt, n):
    x = Format.F64 if fmt == Format.F64 else Format.F32
    t = operands(n, x, prev=fmt)
    g, prev = t["g"].values.astype(np.float64), t["prev"].values.astype(np.float64)
    got = run(Op.PRODUCTS, [t, {k: o for k, o in t.items() if k != "prev"}], threads=2)
    assert got is not None
    np.testing.assert_allclose(got[0], [g @ g, g @ prev, prev @ prev], rtol=1e-12, atol=1e-12 * n**0.5)
    np.testing.assert_allclose(got[1], [g @ g, 0, 0], rtol=1e-12)


@pytest.mark.parametrize("op", [Op.ADAMW, Op.LION, Op.MOMENTUM], ids=str)
def test_next_keeps_the_raw_gradient_and_may_be_prev(op):
    for fmt in (Format.F32, Format.BF16, Format.F16, Format.Q8):
        t = operands(1000, prev=fmt, m=Format.BF16, v=Format.BF16)
        separate = {**t, "next": Operand(fmt, np.zeros(1000))}
        g, prev_before = t["g"].values.copy(), t["prev"].data.copy()
        same = {k: Operand(o.format, o.values, signed=k != "v") for k, o in t.items()}
        same["next"] = same["prev"]
        run(op, [{**separate, **NUMBERS}, {**same, **NUMBERS}], flags=DRAWN, clip_norm=1.0)
        kept = Operand(fmt, g)
        np.testing.assert_array_equal(separate["next"].data, kept.data)
        np.testing.assert_array_equal(same["next"].data, kept.data)
        np.testing.assert_array_equal(t["prev"].data, prev_before)
        np.testing.assert_array_equal(t["m"].data, same["m"].data)
        np.testing.assert_array_equal(t["x"].data, same["x"].data)


def test_one_loop_for_bf16_state_gives_the_bits_of_separate_passes():
    """With vmax at 0, amsgrad changes nothing but the way through the kernels."""
    for prev, b in ((Format.BF16, 0.4), (Format.BF16, 0.0), ("none", 0.4)):
        ts = [operands(5001, m=Format.BF16, v=Format.BF16, prev=prev, vmax=True) for _ in range(2)]
        for t, flags in zip(ts, (DRAWN, DRAWN | Flag.AMSGRAD), strict=True):
            t["vmax"].data[:] = 0
            t["next"] = t["prev"] if prev == Format.BF16 else Operand(Format.BF16, np.zeros(5001))
            run(Op.ADAMW, [{**t, **NUMBERS, "b": b}], flags=flags, clip_norm=1.0)
        for name in ("x", "m", "v", "next"):
            np.testing.assert_array_equal(ts[0][name].data, ts[1][name].data)


def test_b_of_zero_does_not_read_the_previous_gradient():
    t = operands(300)
    t["prev"].data[:] = np.nan
    run(Op.ADAMW, [{**t, **NUMBERS, "b": 0.0}], clip_norm=1.0)
    assert np.isfinite(t["x"].values).all()


@pytest.mark.parametrize("m", [Format.F32, Format.BF16, Format.F16, Format.Q8], ids=lambda f: f.name)
@pytest.mark.parametrize("x", [Format.F32, Format.F64, Format.BF16, Format.F16], ids=lambda f: f.name)
@pytest.mark.parametrize("op", [Op.ADAMW, Op.LION, Op.MOMENTUM], ids=str)
def test_every_format_takes_the_same_step(op, x, m):
    """Moments are used before they are rounded, so that x agrees to the rounding of x alone."""
    for n in (1, 129, 5000):
        for flags in (Flag(0), DRAWN, DRAWN | Flag.AMSGRAD):
            t = operands(n, x, m=m, v=m, prev=m, g=x, vmax=True, out=Format.BF16)
            before = {k: o.values.copy() for k, o in t.items()}
            want = step(op, before, flags=flags, clip_norm=1.0, **NUMBERS)
            run(op, [{**t, **NUMBERS}], flags=flags, clip_norm=1.0, threads=2)
            eps = {Format.F64: 1e-6, Format.F32: 3e-6, Format.BF16: 2**-8, Format.F16: 2**-10}
            if op != Op.LION:
                np.testing.assert_allclose(t["x"].values, want["x"], rtol=eps[x], atol=eps[x] / 10)
            for name in ("m", "v"):
                if m == Format.Q8:  # one code, of the block's largest
                    bound = 2 / 127 if name == "m" else 4 / 255
                    scale = np.repeat(t[name].scales, 128)[:n]
                    assert (np.abs(t[name].values - want[name]) <= bound * scale).all()
                else:
                    rtol = 2**-7 if m == Format.BF16 else eps[m]
                    np.testing.assert_allclose(t[name].values, want[name], rtol=rtol, atol=1e-6)
            if op == Op.MOMENTUM:
                np.testing.assert_allclose(t["out"].values, want["out"], rtol=2**-8, atol=1e-6)


# Codecs, bit for bit: with beta = 0 a moment is the gradient or its square, with decay 0 a weight is the direction.


def stored_m(x, fmt: Format, flags=PLAIN, library=None, key=99) -> Operand:
    t = {"g": Operand(Format.F32, x), "m": Operand(fmt, np.zeros(len(x)))}
    run(Op.MOMENTUM, [{**t, "key": key}], flags=flags, beta1=0.0, library=library)
    return t["m"]


def stored_v(root, fmt: Format, flags=PLAIN, library=None, key=99) -> Operand:
    n = len(root)
    t = {"x": Operand(Format.F32, np.ones(n)), "g": Operand(Format.F32, root), "m": Operand(fmt, np.zeros(n))}
    t["v"] = Operand(fmt, np.zeros(n), signed=False)
    run(Op.ADAMW, [{**t, "key": key}], flags=flags, beta1=0.0, beta2=0.0, library=library)
    return t["v"]


def stored_x(x, fmt: Format, rounding: Rounding, library=None, key=99) -> tuple[Operand, Operand]:
    dtype = {Rounding.REMAINDER16: np.int16, Rounding.REMAINDER8: np.int8}.get(rounding, np.uint16)
    t = {"x": Operand(fmt, np.zeros(len(x))), "out": Operand(Format.F32, x)}
    extra = Operand(None, np.zeros(len(x), dtype), dtype=dtype)
    numbers = {"decay": 0.0, "step_size": -1.0, "key": key}
    run(Op.DESCEND, [{**t, "extra": extra, **numbers}], rounding=rounding, library=library)
    return t["x"], extra


def raw(operand: Operand) -> np.ndarray:
    return operand.data.view(np.uint16).astype(np.int64)


@each_library
def test_bf16_and_fp16_round_to_nearest(library):
    x = np.concatenate([awkward(20000), f32([0.0, np.inf, -np.inf])])
    np.testing.assert_array_equal(raw(stored_m(x, Format.BF16, library=library)), bf16_nearest(x))
    with np.errstate(over="ignore"):
        want = x.astype(np.float16)
    np.testing.assert_array_equal(raw(stored_m(x, Format.F16, library=library)), want.view(np.uint16))
    for payload in (0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF):
        nan = from_bits(np.full(40, payload))
        for fmt in (Format.BF16, Format.F16):
            for flags in (Flag(0), DRAWN):
                assert np.isnan(stored_m(nan, fmt, flags, library).values).all()


@each_library
def test_every_16_bit_pattern_survives(library):
    pattern = np.arange(65536).astype(np.uint16)
    for fmt in (Format.F16, Format.BF16):
        m = Operand(fmt, np.zeros(65536))
        m.data[:] = pattern.view(m.data.dtype)
        decoded = m.values.copy()
        out = Operand(Format.F32, np.zeros(65536))
        run(
            Op.MOMENTUM,
            [{"m": m, "g": Operand(Format.F32, np.ones(65536)), "out": out, "a": 0.0}],
            beta1=1.0,
            library=library,
        )
        np.testing.assert_array_equal(out.data, f32(decoded))
        ordinary = ~np.isnan(decoded) & (pattern != 0x8000)  # -0 + 0 is 0
        np.testing.assert_array_equal(raw(m)[ordinary], pattern[ordinary])
        assert np.isnan(m.values[np.isnan(decoded)]).all()


@each_library
def test_bf16_moments_are_drawn(library):
    x = np.concatenate([awkward(5000), f32([np.inf, -np.inf])])
    h = random_bits(len(x), 99)
    np.testing.assert_array_equal(
        raw(stored_m(x, Format.BF16, DRAWN, library)), bf16_drawn(x, h & 0xFFFF).astype(np.int64)
    )
    root = f32(values(5000, 1))
    want = bf16_drawn(root * root, random_bits(5000, 99) >> 16)
    np.testing.assert_array_equal(raw(stored_v(root, Format.BF16, DRAWN, library)), want)
    np.testing.assert_array_equal(raw(stored_v(root, Format.BF16, Flag.STOCHASTIC_M, library)), bf16_nearest(root**2))


@each_library
@pytest.mark.parametrize("drawn", [False, True])
def test_8_bit_codes(drawn, library):
    spread = f32(values(5000, 3) * 10.0 ** values(5000, 4))
    spread[256:384] = 0
    spread[400:420] = 0
    flags = DRAWN if drawn else Flag(0)
    h = random_bits(5000, 99)
    codes, scales = q8_encode(spread, True, h & 0xFFFF if drawn else None)
    got = stored_m(spread, Format.Q8, flags, library)
    np.testing.assert_array_equal(got.data, codes)
    np.testing.assert_array_equal(got.scales, scales)
    codes, scales = q8_encode(spread * spread, False, h >> 16 if drawn else None)
    got = stored_v(spread, Format.Q8, flags, library)
    np.testing.assert_array_equal(got.data, codes)
    np.testing.assert_array_equal(got.scales, scales)
    assert (got.data[spread != 0] > 0).all()


@each_library
def test_8_bit_codes_are_read_and_written_back_unchanged(library):
    rng = np.random.default_rng(0)
    n = 128 * 40 + 5
    t = operands(n, m=Format.Q8, v=Format.Q8, prev=Format.Q8)
    for name, low, high in (("m", -127, 128), ("v", 0, 256)):
        t[name].data[:] = rng.integers(low, high, n)
        t[name].data[::128] = high - 1  # the block's largest is the scale
        t[name].scales[:] = 10 ** rng.uniform(-20, 20, len(t[name].scales))
    before = {name: (t[name].data.copy(), t[name].scales.copy()) for name in ("m", "v")}
    t["x"].data[:] = 0
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        want = -q8_decode(*before["m"]) / np.sqrt(q8_decode(*before["v"]).astype(np.float64))
    run(Op.ADAMW, [{**t, "a": 0.0, "step_size": 1.0}], beta1=1.0, beta2=1.0, eps=0.0, library=library)
    for name in ("m", "v"):
        np.testing.assert_array_equal(t[name].data, before[name][0])
        np.testing.assert_array_equal(t[name].scales, before[name][1])
    kept = np.isfinite(want) & (np.abs(want) < 1e38)
    np.testing.assert_allclose(t["x"].data[kept], want[kept], rtol=1e-6)


@each_library
@pytest.mark.parametrize("size", [1e-40, 1e37])
def test_8_bit_codes_of_scales_near_the_ends_of_fp32(size, library):
    x = f32(np.linspace(-10, 10, 128) * size)
    codes, scales = q8_encode(x, True)
    got = stored_m(x, Format.Q8, Flag(0), library)
    assert np.abs(got.data.astype(int) - codes).max() <= 1  # halves between two codes
    np.testing.assert_array_equal(got.scales, scales)


def test_8_bit_error_is_bounded():
    x = f32(values(12800, 5))
    m = stored_m(x, Format.Q8)
    scale = np.repeat(m.scales, 128)
    root = np.sqrt(np.abs(x) / scale)
    # Half a code of y = 127 sqrt(|x| / scale), by the slope of y^2.
    assert (np.abs(m.values - x) <= scale * (root + 0.5 / 127) / 127 * (1 + 1e-5)).all()


@pytest.mark.parametrize("fmt", [Format.Q8, Format.BF16], ids=lambda f: f.name)
def test_blocks_that_are_not_finite(fmt):
    for bad in (np.inf, -np.inf, np.nan):
        x = f32(values(400, 1))
        x[130] = bad
        for stored, want in ((stored_m(x, fmt), x), (stored_v(x, fmt), x * x)):
            block = stored.values[128:256]
            assert np.isnan(block).all() if fmt == Format.Q8 else not np.isfinite(block[2])
            rest = np.r_[0:128, 256:400]
            assert np.isfinite(stored.values[rest]).all()
            assert np.isfinite(want[rest]).all()


@each_library
def test_weights_to_nearest_and_drawn(library):
    x = awkward(5000)
    np.testing.assert_array_equal(raw(stored_x(x, Format.BF16, Rounding.NEAREST, library)[0]), bf16_nearest(x))
    h = random_bits(5000, 99 ^ 0x5BD1E995) >> 16
    got, _ = stored_x(x, Format.BF16, Rounding.STOCHASTIC, library)
    np.testing.assert_array_equal(raw(got), bf16_drawn(x, h))
    normal = (np.abs(x) >= 2.0**-14) & (np.abs(x) < 65504)
    got, _ = stored_x(x, Format.F16, Rounding.STOCHASTIC, library)
    want = from_bits((bits(x) + (h & 0x1FFF)) & ~0x1FFF)
    np.testing.assert_array_equal(got.values[normal], want[normal].astype(np.float16))


@pytest.mark.parametrize("fmt", [Format.BF16, Format.F16], ids=lambda f: f.name)
@each_library
def test_remainders(library, fmt):
    x = awkward(20000) if fmt == Format.BF16 else f32(values(20000, 3))
    x = x[np.abs(x) < 3.38e38] if fmt == Format.BF16 else x[np.abs(x) > 2.0**-14]
    dropped = 16 if fmt == Format.BF16 else 13
    p, extra = stored_x(x, fmt, Rounding.REMAINDER16, library)
    half_up = (bits(x) + (1 << (dropped - 1))) >> dropped << dropped
    np.testing.assert_array_equal(bits(p.values), half_up)
    np.testing.assert_array_equal(bits(p.values) + extra.data, bits(x))
    p8, extra8 = stored_x(x, fmt, Rounding.REMAINDER8, library)
    np.testing.assert_array_equal(p8.data, p.data)
    h = random_bits(len(x), 99 ^ 0x5BD1E995) >> 16 & ((1 << (dropped - 8)) - 1)
    want = np.clip((extra.data.astype(np.int64) + h) >> (dropped - 8), -128, 127)
    np.testing.assert_array_equal(extra8.data, want)


def test_remainders_of_fp16_beyond_its_range():
    x = f32([2.0**-20 * 1.3, 2.0**-30, 0.0, 1e30, -1e30, np.inf, np.nan, 65519.0])
    p, extra = stored_x(x, Format.F16, Rounding.REMAINDER16)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(p.values[:6], x[:6].astype(np.float16))
    assert (extra.data[2:7] == 0).all()
    difference = np.clip(bits(x) - bits(p.values.astype(np.float32)), -32768, 32767)
    np.testing.assert_array_equal(extra.data[[0, 1, 7]], difference[[0, 1, 7]])


@pytest.mark.parametrize("rounding", [Rounding.REMAINDER16, Rounding.REMAINDER8], ids=str)
def test_remainders_of_infinity_and_nan_are_zero(rounding):
    x = f32([np.inf, -np.inf, np.nan, 1.0])
    for fmt in (Format.BF16, Format.F16):
        p, extra = stored_x(x, fmt, rounding)
        np.testing.assert_array_equal(p.values, x)
        assert (extra.data[:3] == 0).all()


@pytest.mark.parametrize("n", SIZES)
def test_bf16_with_a_16_bit_remainder_is_an_fp32_run(n):
    start = bf16_value(bf16_nearest(values(n, 0)))
    narrow, wide = operands(n), operands(n)
    wide["x"] = Operand(Format.F32, start)
    narrow["x"] = Operand(Format.BF16, start)
    narrow["extra"] = Operand(None, np.zeros(n, np.int16), dtype=np.int16)
    for _ in range(5):
        run(Op.ADAMW, [{**narrow, **NUMBERS}], rounding=Rounding.REMAINDER16, clip_norm=1.0)
        run(Op.ADAMW, [{**wide, **NUMBERS}], clip_norm=1.0)
    joined = bits(narrow["x"].values) + narrow["extra"].data
    np.testing.assert_array_equal(joined, bits(wide["x"].values))


@pytest.mark.parametrize("fmt", [Format.BF16, Format.F16], ids=lambda f: f.name)
def test_kahan_and_remainders_follow_an_fp32_run(fmt):
    n, steps = 2000, 200
    start = Operand(fmt, values(n, 0)).values.astype(np.float32)
    wide = {"x": Operand(Format.F32, start), "out": Operand(Format.F32, values(n, 1))}
    numbers = {"decay": 0.9999, "step_size": 1e-5}
    drift = {}
    for rounding in Rounding:
        dtype = {Rounding.REMAINDER16: np.int16, Rounding.REMAINDER8: np.int8}.get(rounding, np.uint16)
        extra = Operand(None, np.zeros(n, dtype), dtype=dtype)
        t = {"x": Operand(fmt, start), "out": wide["out"], "extra": extra}
        for i in range(steps):
            run(Op.DESCEND, [{**t, **numbers, "key": i}], rounding=rounding)
        drift[rounding] = t["x"].values.astype(np.float64)
    for _ in range(steps):
        run(Op.DESCEND, [{**wide, **numbers}])
    error = {rounding: np.abs(x - wide["x"].values).mean() for rounding, x in drift.items()}
    spacing = 2.0 ** (-9 if fmt == Format.BF16 else -12)  # the mean rounding error of a weight, about
    for rounding in (Rounding.KAHAN, Rounding.REMAINDER16, Rounding.REMAINDER8):
        assert error[rounding] < spacing, rounding
    walk = drift[Rounding.STOCHASTIC] - wide["x"].values
    assert abs(walk.mean()) < 5 * walk.std() / n**0.5


@pytest.mark.parametrize(
    ("name", "store"),
    [
        ("bf16 m", lambda x, key: stored_m(x, Format.BF16, DRAWN, key=key).values),
        ("8-bit m", lambda x, key: stored_m(x, Format.Q8, DRAWN, key=key).values),
        ("bf16 v", lambda x, key: stored_v(np.sqrt(x), Format.BF16, DRAWN, key=key).values),
        ("8-bit v", lambda x, key: stored_v(np.sqrt(x), Format.Q8, DRAWN, key=key).values),
        ("bf16 x", lambda x, key: stored_x(x, Format.BF16, Rounding.STOCHASTIC, key=key)[0].values),
        ("fp16 x", lambda x, key: stored_x(x, Format.F16, Rounding.STOCHASTIC, key=key)[0].values),
    ],
)
def test_stochastic_rounding_is_unbiased(name, store):
    x = np.full(128 * 8, 0.3001234, np.float32)
    x[::128] = 1.0
    x[1::3] = 0.0123456
    kept = np.arange(len(x)) % 128 != 0
    draws = np.stack([store(x, key).astype(np.float64) for key in range(200)])[:, kept]
    target = np.sqrt(x[kept]) ** 2
    for value in np.unique(target):
        group = draws[:, target == value]
        # Five standard errors of the mean.
        assert abs(group.mean() - value) < 5 * group.std() / group.size**0.5 + 1e-7 * value, name
        assert group.std() > 0


# Threads, levels, processes.


def everything(n: int, library, threads: int) -> list[np.ndarray]:
    """Results of a call with each path through the kernels over several tensors."""
    results = []
    half = Rounding.REMAINDER16
    for x, m, rounding in [
        (Format.F32, Format.F32, Rounding.NEAREST),
        (Format.F32, Format.BF16, Rounding.NEAREST),
        (Format.F64, Format.F64, Rounding.NEAREST),
        (Format.BF16, Format.Q8, half),
        (Format.F16, Format.F16, Rounding.STOCHASTIC),
    ]:
        for op in (Op.ADAMW, Op.LION, Op.MOMENTUM, Op.PRODUCTS):
            ts = [operands(n // (i + 1), x, m=m, v=m, prev=m, g=x, seed=i) for i in range(4)]
            for t in ts:
                if rounding == half:
                    t["extra"] = Operand(None, np.zeros(len(t["x"].data), np.int16), dtype=np.int16)
                t["next"] = t["prev"]
            records = [{**t, **NUMBERS} for t in ts]
            sums = run(op, records, library=library, threads=threads, flags=DRAWN, rounding=rounding, clip_norm=1.0)
            results += [o.data.copy() for t in ts for o in t.values()] + ([] if sums is None else [sums])
    for op in (Op.ADAMW, Op.LION):
        for formats in ({}, *NARROW):
            for what in SURPRISES:
                t, clip_norm = surprise(what, n, **formats)
                run(op, [t], library=library, threads=threads, clip_norm=clip_norm, flags=DRAWN)
                results += [t[name].data.copy() for name in ("x", "m", "v", "next") if name in t]
    return results


def assert_equal_bits(got: list[np.ndarray], want: list[np.ndarray]) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


def test_any_number_of_threads_gives_the_same_bits():
    want = everything(150_001, native.load(), 1)
    for threads in (2, 3, 4):
        assert_equal_bits(everything(150_001, native.load(), threads), want)


@pytest.mark.skipif(LEVELS < 3, reason="needs a CPU with AVX2 and AVX-512")
def test_levels_with_fused_multiply_add_give_the_same_bits():
    assert_equal_bits(everything(40_001, LIBRARIES[1], 1), everything(40_001, LIBRARIES[2], 1))


@each_library
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("op", [Op.ADAMW, Op.LION, Op.MOMENTUM], ids=str)
def test_steps_at_every_level(op, n, library):
    for plain, tolerance in ((Format.F32, 3e-6), (Format.F64, 1e-13)):
        t = operands(n, plain, out=plain)
        want = step(op, {k: o.values for k, o in t.items()}, clip_norm=0.7, **NUMBERS)
        run(op, [{**t, **NUMBERS}], clip_norm=0.7, library=library)
        for name in ("m", "v", "out") if op == Op.MOMENTUM else ("m", "v", "x"):
            off = np.abs(t[name].values - want[name])
            assert (off > tolerance * (1 + np.abs(want[name]))).sum() <= (n * 1e-3 if op == Op.LION else 0)


def test_two_callers_at_once():
    want = everything(60_001, native.load(), 2)
    got: list[list[np.ndarray]] = [[], []]

    def work(i: int) -> None:
        got[i] = everything(60_001, native.load(), 2)

    callers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for results in got:
        assert_equal_bits(results, want)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_its_own_threads():
    want = everything(100_001, native.load(), 3)
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # torch itself would wait for threads that the child has not
            assert_equal_bits(everything(100_001, native.load(), 3), want)
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert_equal_bits(everything(100_001, native.load(), 3), want)


def test_nothing_to_do():
    run(Op.ADAMW, [], clip_norm=1.0)
    run(Op.PRODUCTS, [])


def test_many_small_tensors():
    ts = [operands(i % 7, seed=i) for i in range(300)]
    want = [step(Op.ADAMW, {k: o.values for k, o in t.items()}, clip_norm=1.0, **NUMBERS) for t in ts]
    run(Op.ADAMW, [{**t, **NUMBERS} for t in ts], clip_norm=1.0, threads=2)
    for t, w in zip(ts, want, strict=True):
        np.testing.assert_allclose(t["x"].values, w["x"], rtol=3e-6, atol=3e-6)


@each_library
def test_every_nan_stays_one_in_bf16_state(library):
    """A clip by a norm that is nan makes nan of numbers, too, and so does a factor of the previous gradient."""
    for payload in (0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF):
        for formats in NARROW[:2]:
            for clip_norm in (0.0, 1.0):
                t = {**surprise("none", 300, **formats)[0]}
                t["next"] = t["prev"]
                t["g"].data[: 7 if clip_norm else 300] = from_bits(np.uint32(payload))
                run(Op.ADAMW, [t], flags=DRAWN, library=library, clip_norm=clip_norm)
                for name in ("x", "m", "v"):
                    assert np.isnan(t[name].values).all()
                assert np.isnan(t["prev"].values[:7]).all()
                t = surprise("none", 300, **formats)[0]
                t["next"], t["ratio"] = t["prev"], float(from_bits(np.uint32(payload)))
                run(Op.ADAMW, [t], flags=DRAWN, library=library)
                assert np.isnan(t["m"].values).all()


def test_infinite_and_nan_gradients_follow_ieee():
    t = operands(1000)
    t["g"].data[3] = np.nan
    run(Op.ADAMW, [{**t, **NUMBERS}], clip_norm=1.0)
    assert np.isnan(t["x"].values).all()  # the norm is nan
    t = operands(1000)
    t["g"].data[3] = np.inf
    run(Op.ADAMW, [{**t, **NUMBERS}], clip_norm=1.0)
    assert np.isnan(t["x"].values[3])  # 0 * inf
    assert np.isfinite(np.delete(t["x"].values, 3)).all()
    t = operands(1000)
    t["g"].data[3] = np.nan
    run(Op.LION, [{**t, **NUMBERS}])
    assert np.isnan(t["x"].values[3])
    assert np.isnan(t["x"].values).sum() == 1
    for sign in (1.0, np.nan):
        t = operands(10, vmax=True)
        t["vmax"].data[4] = np.nan * sign
        t["g"].data[5] = np.nan
        run(Op.ADAMW, [{**t, **NUMBERS}], flags=Flag.AMSGRAD)
        assert np.isnan(t["x"].values[4:6]).all()
        assert np.isnan(t["vmax"].values[4:6]).all()


# The binding.


def test_the_struct_and_the_record_have_the_headers_size():
    assert ctypes.sizeof(native.Call) == 80
    assert native.RECORD.size == 8 * len(native.RECORD_FIELDS) == 208


def test_columns_are_packed_as_records():
    words = [array("Q", [100 * i, 100 * i + 1, 2**63 - 1]) for i in range(16)]
    numbers = [array("d", [0.5 * i, -0.5 * i, np.inf]) for i in range(10)]
    rows = zip(*words, *numbers, strict=True)
    assert native.pack([*words, *numbers]) == b"".join(native.RECORD.pack(*row) for row in rows)
    assert native.pack([array("Q")] * 16 + [array("d")] * 10) == b""


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numbers_are_advanced_where_they_lie(dtype):
    counts = [np.array([0, i, 7], dtype) for i in range(5)]
    addresses = array("Q", [count.ctypes.data + count.itemsize for count in counts])
    assert native.load().add(addresses, 1.0, is_double=dtype == np.float64) == [1, 2, 3, 4, 5]
    assert [count.tolist() for count in counts] == [[0, i + 1, 7] for i in range(5)]
    assert native.load().add(array("Q"), 1.0, is_double=False) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"op": 9},
        {"x_format": Format.Q8},
        {"x_format": Format.F64},
        {"g_format": Format.Q8},
        {"arithmetic": 1},
        {"rounding": Rounding.KAHAN},
        {"m_format": Format.F64},
        {"op": Op.PRODUCTS},
    ],
    ids=str,
)
def test_a_call_that_makes_no_sense_is_refused(wrong):
    call = native.Call(op=Op.ADAMW)
    for name, value in wrong.items():
        setattr(call, name, value)
    with pytest.raises(RuntimeError, match="refused the call"):
        native.run(call, bytearray(native.RECORD.size), 1)


@pytest.mark.parametrize("isa", [one.isa for one in LIBRARIES], ids=lambda isa: isa.name)
def test_the_environment_forces_a_level(isa, monkeypatch):
    monkeypatch.setenv("MARS_NATIVE_ISA", isa.name.lower())
    assert native.load.__wrapped__().isa == isa


def test_an_unknown_level_is_an_error(monkeypatch):
    monkeypatch.setenv("MARS_NATIVE_ISA", "sse9")
    with pytest.raises(NativeUnavailable, match="'sse9'; it must be one of baseline, avx2, avx512"):
        native.load.__wrapped__()


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    with pytest.raises(NativeUnavailable, match=r"not built.*install a C\+\+17 compiler"):
        library.opened(tmp_path / "_native.so")
    (tmp_path / "_native.so").write_text("not a library")
    with pytest.raises(NativeUnavailable, match="does not load"):
        library.opened(tmp_path / "_native.so")
    monkeypatch.setattr(library, "ABI_VERSION", 999)
    with pytest.raises(NativeUnavailable, match="needs 999"):
        library.handle.__wrapped__()


def test_a_process_that_used_threads_exits():
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]; from test_native_library import everything, native; "
        "everything(100_001, native.load(), 4)"
    )
    here = os.path.dirname(__file__)
    subprocess.run([sys.executable, "-c", code, here], check=True, timeout=60)
