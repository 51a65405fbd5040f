"""The kernels' number formats and steps in numpy, written from their description alone, and memory to run them on."""

from __future__ import annotations

import numpy as np
import torch

from mars_optim.backends import native_library as native
from mars_optim.backends.native_library import Arithmetic, Flag, Format, Op, Rounding

GUARD = 0x5A  # every byte around an operand
STORAGE: dict[Format | None, type] = {
    Format.F32: np.float32,
    Format.F64: np.float64,
    Format.BF16: np.uint16,
    Format.F16: np.float16,
}


def f32(x) -> np.ndarray:
    return np.asarray(x, dtype=np.float32)


def bits(x) -> np.ndarray:
    return f32(x).view(np.uint32).astype(np.int64)


def from_bits(b) -> np.ndarray:
    return (np.asarray(b) & 0xFFFFFFFF).astype(np.uint32).view(np.float32)


def random_bits(n: int, key: int) -> np.ndarray:
    mask = 0xFFFFFFFF
    x = key ^ key >> 16
    x = x * 0x85EBCA6B & mask
    x ^= x >> 13
    x = x * 0xC2B2AE35 & mask
    return np.array([((x ^ x >> 16) + i * 0x9E3779B1) & mask for i in range(n)], dtype=np.int64)


def bf16_nearest(x) -> np.ndarray:
    return torch.from_numpy(f32(x).copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)


def bf16_value(h) -> np.ndarray:
    return (np.asarray(h).astype(np.uint32) << 16).view(np.float32)


def bf16_drawn(x, r16) -> np.ndarray:
    drawn = ((bits(x) + r16) >> 16).astype(np.uint16)
    return np.where(np.isfinite(f32(x)), drawn, bf16_nearest(x))


LEVELS_SIGNED = [(f32(q) / f32(127)) ** 2 for q in range(128)]
LEVELS_UNSIGNED = [((f32(q) / f32(255)) ** 2) ** 2 for q in range(256)]


def q8_decode(codes, scales) -> np.ndarray:
    levels = f32(LEVELS_SIGNED if codes.dtype == np.int8 else LEVELS_UNSIGNED)
    magnitude = np.repeat(scales, 128)[: len(codes)] * levels[np.abs(codes.astype(int))]
    return np.where(codes.astype(int) < 0, -magnitude, magnitude)


def q8_encode(x, signed: bool, r16=None) -> tuple[np.ndarray, np.ndarray]:
    """Element by element: the levels on either side, and which of them it is."""
    x = f32(x)
    levels = f32(LEVELS_SIGNED if signed else LEVELS_UNSIGNED)
    codes, scales = np.zeros(len(x), np.int8 if signed else np.uint8), f32(np.zeros(-(-len(x) // 128)))
    for b in range(len(scales)):
        block = slice(128 * b, 128 * b + 128)
        finite = np.isfinite(x[block]).all()
        scales[b] = np.abs(x[block]).max() if finite else np.nan
        if not finite or scales[b] == 0:
            continue
        ratio = np.abs(x[block]) / scales[b]
        root = np.sqrt(ratio) if signed else np.sqrt(np.sqrt(ratio))
        y = f32(len(levels) - 1) * root
        code = np.rint(y).astype(int)
        if r16 is not None:
            low = np.minimum(np.floor(y).astype(int), len(levels) - 2)
            fraction = (ratio - levels[low]) / (levels[low + 1] - levels[low])
            code = low + ((f32(r16[block]) + f32(0.5)) / f32(65536) < fraction)
        if not signed:
            code = np.where((code == 0) & (x[block] > 0), 1, code)
        codes[block] = np.where(x[block] < 0, -code, code)
    return codes, scales


class Operand:
    """An array in a storage format between guards, one element away from an aligned address unless `aligned`."""

    def __init__(self, fmt: Format | None, values, *, signed: bool = True, dtype=None, aligned: bool = False) -> None:
        self.format, n = fmt, len(values)
        dtype = np.dtype(dtype or STORAGE.get(fmt, np.int8 if signed else np.uint8))
        self.memory = np.full(n * dtype.itemsize + 192, GUARD, np.uint8)
        self.start = 64 + -self.memory.ctypes.data % 64 + (0 if aligned else dtype.itemsize)
        self.data = self.memory[self.start : self.start + n * dtype.itemsize].view(dtype)
        self.scale_memory = np.full(-(-n // 128) + 2, 1e9, np.float32)
        self.scales = self.scale_memory[1:-1]
        if fmt is None:
            self.data[:] = values
        elif fmt == Format.BF16:
            self.data[:] = bf16_nearest(values)
        elif fmt == Format.Q8:
            self.data[:], self.scales[:] = q8_encode(values, signed)
        else:
            with np.errstate(over="ignore"):
                self.data[:] = values

    @property
    def values(self) -> np.ndarray:
        if self.format == Format.BF16:
            return bf16_value(self.data)
        return q8_decode(self.data, self.scales) if self.format == Format.Q8 else self.data

    def check_guards(self) -> None:
        assert (self.memory[: self.start] == GUARD).all()
        assert (self.memory[self.start + self.data.nbytes :] == GUARD).all()
        assert self.scale_memory[0] == self.scale_memory[-1] == 1e9


PLAIN = Flag(0)
DEFAULTS = {
    "key": 0,
    "a": 1.0,
    "b": 0.0,
    "ratio": 1.0,
    "we": 1.0,
    "wg": 0.0,
    "decay": 1.0,
    "step_size": 0.0,
    "inv_sqrt_bias2": 1.0,
    "g_norm": np.inf,
    "prev_norm": np.inf,
}


def run(
    op: Op, tensors: list[dict], *, library=None, flags=PLAIN, rounding=Rounding.NEAREST, threads=1, **call_numbers
) -> np.ndarray | None:
    """Run one call; each tensor is a record's fields, operands for addresses. Formats are the operands' own."""

    def fmt(name: str, default=Format.F32) -> Format:
        found = {t[name].format for t in tensors if isinstance(t.get(name), Operand)}
        assert len(found) <= 1
        return found.pop() if found else default

    x = fmt("x", fmt("m"))
    arithmetic = Arithmetic.DOUBLE if x == Format.F64 else Arithmetic.FLOAT
    plain = Format.F64 if arithmetic else Format.F32
    x = x if x in STORAGE else plain
    call = native.Call(op, arithmetic, x, fmt("g", plain), fmt("prev", fmt("next", plain)), fmt("m", plain))
    call.v_format, call.out_format = fmt("v", plain), fmt("out", plain)
    call.rounding, call.flags, call.num_threads = rounding, flags, threads
    for name, value in {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "clip_norm": 0.0, **call_numbers}.items():
        setattr(call, name, value)
    records = bytearray(native.RECORD.size * len(tensors))
    for i, tensor in enumerate(tensors):
        operands = [o for o in tensor.values() if isinstance(o, Operand)]
        words = {"n": len(operands[0].data)}
        for name in native.RECORD_FIELDS[1:]:
            value = tensor.get(name.removesuffix("_scale"), DEFAULTS.get(name, 0))
            if isinstance(value, Operand):
                value = (value.scales if name.endswith("_scale") else value.data).ctypes.data
            words[name] = value
        native.RECORD.pack_into(records, i * native.RECORD.size, *words.values())
    sums = np.full((len(tensors), 3), np.nan) if op == Op.PRODUCTS else None
    address = None if sums is None else sums.ctypes.data
    (library or native.load()).run(call, records, len(tensors), address)
    for tensor in tensors:
        for operand in tensor.values():
            if isinstance(operand, Operand):
                operand.check_guards()
    return sums


def step(op: Op, t: dict[str, np.ndarray], *, flags=PLAIN, beta1=0.9, beta2=0.99, eps=1e-8, clip_norm=0.0, **w):
    """One tensor's step in float64: the new x, m, v, vmax and out."""
    w = {**DEFAULTS, **w}
    new = {name: np.asarray(value, np.float64).copy() for name, value in t.items()}
    if op == Op.DESCEND:
        new["x"] = w["decay"] * new["x"] - w["step_size"] * new["out"]
        return new
    g = new["g"]
    c = w["a"] * g
    if "prev" in t and w["b"] != 0:
        c = c + w["b"] * (w["ratio"] * g - new["prev"])
    if clip_norm > 0:
        norm = np.sqrt((c * c).sum())
        c = c * (1.0 if norm <= clip_norm else clip_norm / norm)
    new["m"] = beta1 * new["m"] + (1 - beta1) * c
    read = w["we"] * new["m"] + w["wg"] * g if flags & Flag.ONE_BUFFER else new["m"]
    if op == Op.MOMENTUM:
        new["out"] = read
    if op == Op.LION:
        new["x"] = w["decay"] * new["x"] - w["step_size"] * np.sign(read)
    if op == Op.ADAMW:
        new["v"] = beta2 * new["v"] + (1 - beta2) * c * c
        v = new["v"]
        if flags & Flag.AMSGRAD:
            v = new["vmax"] = np.maximum(new["vmax"], v)
        new["x"] = w["decay"] * new["x"] - w["step_size"] * new["m"] / (np.sqrt(v) * w["inv_sqrt_bias2"] + eps)
    return new
