r"""How a state tensor is stored: plain, bfloat16, or 8 bits an element with one scale for every 128 of them.

The 8-bit codes q of a block with scale s, the largest magnitude in it, stand for

    s * sign(q) * (q/127)^2     signed, int8: momentum, previous gradient
    s * (q/255)^4               unsigned, uint8: second moment, whose root the step divides by

so that small elements keep relative precision: spacing 2/(127 sqrt(y)) and 4/(255 y^(1/4)) of an element that is y
times the scale. A second moment above 0 never gets the code 0, by which the step would divide.

Averages move by less than half a spacing a step, and rounding to nearest would pin them. They are rounded
stochastically instead, up or down with the probability that keeps the expectation; random bits are a function of
(tensor, step, element), the same on every backend.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

PRECISIONS = ("fp32", "bf16", "8bit")
BLOCK = 128
_CODES = {"exp_avg_sq": torch.uint8, "max_exp_avg_sq": torch.uint8}  # int8 for all others
_MASK = 0xFFFFFFFF

Key = int | Tensor  # 32 bits; a 0-d int64 tensor where the host must not know the step count


def is_q8(stored: Tensor) -> bool:
    """Whether `stored` holds 8-bit codes."""
    return stored.dtype in (torch.int8, torch.uint8)


def precision_of(setting: str | dict[str, str], name: str) -> str:
    """Return the precision that a group's `state_precision` gives to the state tensor called `name`."""
    if isinstance(setting, str):
        return setting if name in ("exp_avg", "exp_avg_grad", "exp_avg_sq", "max_exp_avg_sq", "prev_grad") else "fp32"
    kind = {"exp_avg_grad": "exp_avg", "max_exp_avg_sq": "exp_avg_sq"}.get(name, name)
    return setting.get(kind, "fp32")


def stored_dtype(name: str, precision: str, full: torch.dtype) -> torch.dtype:
    """Return the dtype of a state tensor whose full precision is `full`."""
    return {"fp32": full, "bf16": torch.bfloat16, "8bit": _CODES.get(name, torch.int8)}[precision]


def new(like: Tensor, name: str, precision: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the entries of a state tensor of zeros, shaped like `like`; `dtype` is that of full precision.

    Reduced precision stores a complex tensor as (real, imaginary) pairs.
    """
    if precision == "fp32":
        return {name: _zeros(like, dtype)}
    like = torch.view_as_real(like) if like.is_complex() else like
    if precision == "bf16":
        return {name: _zeros(like, torch.bfloat16)}
    scale = torch.zeros(-(-like.numel() // BLOCK), dtype=torch.float32, device=like.device)
    return {name: _zeros(like, _CODES.get(name, torch.int8)), f"{name}_scale": scale}


def _zeros(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(like, dtype=dtype, memory_format=torch.preserve_format)


def decode(stored: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the values in `dtype`; `stored` itself where that is how it is stored."""
    if scale is None:
        return stored.to(dtype)
    y = _blocks(_flat(stored).to(dtype))
    y = (y / 255).pow(4) if stored.dtype == torch.uint8 else y * y.abs() / 127**2
    values = torch.empty_like(stored, dtype=dtype)
    _flat(values).copy_((y * scale.to(dtype).unsqueeze(1)).flatten()[: stored.numel()])
    return values


def encode_(stored: Tensor, scale: Tensor | None, values: Tensor, random: Tensor | None = None) -> None:
    """Store `values`: rounded to nearest, or stochastically by `random`, 16 bits for each element of `stored`."""
    if scale is None:
        if random is not None and stored.dtype == torch.bfloat16:
            values = _stochastic_bf16(values.float(), random)
        stored.copy_(values)
        return
    blocks = _blocks(_flat(torch.empty_like(stored, dtype=values.dtype).copy_(values)))
    largest = blocks.abs().amax(dim=1)
    scale.copy_(torch.where(largest.isfinite(), largest, torch.nan))
    y = (blocks / torch.where(largest == 0, torch.ones_like(largest), largest).unsqueeze(1)).nan_to_num(0.0, 0.0, 0.0)
    top, power = (255, 4) if stored.dtype == torch.uint8 else (127, 2)
    bits = None if random is None else _blocks(_flat(torch.empty_like(stored, dtype=torch.int64).copy_(random)))
    codes = _round(y.abs(), top, power, bits)
    if stored.dtype == torch.uint8:
        codes = torch.where((codes == 0) & (y > 0), torch.ones_like(codes), codes)
    else:
        codes = codes * y.sign()
    _flat(stored).copy_(codes.flatten()[: stored.numel()])


def _round(y: Tensor, top: int, power: int, bits: Tensor | None) -> Tensor:
    """Codes of y in [0, 1] on the grid (q/top)^power."""
    root = y.sqrt().sqrt() if power == 4 else y.sqrt()
    if bits is None:
        return (root * top).round()
    below = (root * top).floor().clamp(max=top - 1)
    low, high = (below / top).pow(power), ((below + 1) / top).pow(power)
    return below + ((bits + 0.5) / 65536 < (y - low) / (high - low)).to(below.dtype)


def _stochastic_bf16(values: Tensor, random: Tensor) -> Tensor:
    bits = values.view(torch.int32)
    rounded = ((bits + random.to(torch.int32)) & -65536).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values)


def _flat(dense: Tensor) -> Tensor:
    """A dense tensor's elements in the order of memory."""
    return dense.as_strided((dense.numel(),), (1,))


def _blocks(flat: Tensor) -> Tensor:
    return torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)


@cache
def salt(index: int, shard: int = 0) -> int:
    """Return 32 bits that set the random numbers of a shard of the index-th parameter apart from all others'."""
    return _avalanche((index + 1 + shard * 0x7FEB352D) * 0x9E3779B1 & _MASK)


def key_of(salt: int, step: int | Tensor) -> Key:
    """Return the key of a parameter's random numbers at one step."""
    if isinstance(step, Tensor):
        return (step.to(torch.int64) * 0x85EBCA77 & _MASK) ^ salt
    return (step * 0x85EBCA77 & _MASK) ^ salt


def random_bits(key: Key, like: Tensor) -> Tensor:
    """Return 32 random bits, as int64, for each element of `like`, in the order of memory.

    Element i has hash(key) + i * G modulo 2^32, G odd: at each step equally likely to be any 32 bits, and independent
    from step to step, since the hash is; that is all that rounding needs to be right on average. Within a step
    neighbours' bits are spread more evenly than independent ones would be, and cost one addition. The lowest k bits
    return after 2^k elements, so who needs few takes them from the upper half.
    """
    dense = torch.empty_like(like, dtype=torch.int64, memory_format=torch.preserve_format)
    index = torch.arange(like.numel(), device=like.device, dtype=torch.int64)
    _flat(dense).copy_((index * 0x9E3779B1 + _avalanche(key)) & _MASK)
    return dense


def _avalanche(h: Any) -> Any:
    """Mix 32 bits so that each depends on all; the finaliser of MurmurHash3 (Appleby, public domain)."""
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & _MASK
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & _MASK
    return h ^ (h >> 16)
