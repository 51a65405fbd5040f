r"""How pieces of matrices travel: as numbers, or as codes of a few bits an element.

The code q of an element x in a piece whose scale is s stands for

    s * sign(q) * (q / top)^2,  top = 2^(bits-1) - 1

so that it is off by at most s * (sqrt(|x| / s) / top + 1 / (4 top^2)). The scale is the piece's largest magnitude,
rounded up to bfloat16; where the piece has an inf or nan, the scale is one, and so is all that arrives.

Nothing travels beside the codes. Four are `bits` / 2 bytes; what is left of a piece, up to three elements, takes a byte
each, with codes of 8 bits; and the first 16 elements have codes one bit shorter, whose lowest bits are the scale's 16.
A smaller piece travels as bfloat16.
"""
# torch.linalg and Tensor.split are not typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# A momentum's small singular values count in its polar factor as much as the large ones, and drown in its rounding;
# rounding the factor itself is an error of its own size. Together two bytes an element: one exchange in bfloat16.
_BITS_THERE, _BITS_BACK = 10, 6
_TAIL_BITS = 8
_SCALE_BITS = 16
_HEAD_BYTES_A_BIT = _SCALE_BITS // 8


@dataclass(frozen=True)
class Wire:
    """How the pieces of one way travel.

    Attributes:
        dtype: of the values, before and after.
        bits: of a code, even; None: the values themselves travel.
    """

    dtype: torch.dtype
    bits: int | None = None

    @property
    def item_bytes(self) -> int:
        """Bytes of one item of a buffer."""
        return self.dtype.itemsize if self.bits is None else 1

    def length(self, sizes: Sequence[int]) -> int:
        """Return the number of items that pieces of so many elements take."""
        return sum(sizes) if self.bits is None else sum(_num_bytes(size, self.bits) for size in sizes)

    def encode(self, pieces: Sequence[Tensor], device: torch.device) -> Tensor:
        """Return the buffer for 1-D pieces."""
        if self.bits is None:
            return torch.cat([torch.empty(0, dtype=self.dtype, device=device), *(p.to(self.dtype) for p in pieces)])
        coded = iter(_encode([p.to(self.dtype) for p in pieces if len(p) >= _SCALE_BITS], self.bits))
        parts = [next(coded) if len(p) >= _SCALE_BITS else p.to(torch.bfloat16).view(torch.uint8) for p in pieces]
        return torch.cat([torch.empty(0, dtype=torch.uint8, device=device), *parts])

    def decode(self, buffer: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Undo `encode` for pieces of so many elements."""
        if self.bits is None:
            return list(buffer.split(list(sizes)))
        parts = buffer.split([_num_bytes(size, self.bits) for size in sizes])
        long = [(part, size) for part, size in zip(parts, sizes, strict=True) if size >= _SCALE_BITS]
        coded = iter(_decode([part for part, _ in long], [size for _, size in long], self.bits, self.dtype))
        return [
            # Cloned: a number of two bytes has to lie at an even place.
            next(coded) if size >= _SCALE_BITS else part.clone().view(torch.bfloat16).to(self.dtype)
            for part, size in zip(parts, sizes, strict=True)
        ]

    def rounded(self, values: Tensor) -> Tensor:
        """Return one piece, of any shape, as it arrives."""
        flat = values.reshape(-1)
        return self.decode(self.encode([flat], values.device), [len(flat)])[0].view(values.shape)


def wires(precision: str, dtype: torch.dtype) -> tuple[Wire, Wire]:
    """Return how momenta of `dtype` go to their owner and how results come back.

    Args:
        precision: `"fp32"` (as precise as `dtype`), `"bf16"` or `"8bit"`, which is on average over both ways.
        dtype: of the momenta.
    """
    if precision == "8bit":
        return Wire(dtype, _BITS_THERE), Wire(dtype, _BITS_BACK)
    plain = Wire(torch.bfloat16 if precision == "bf16" else dtype)
    return plain, plain


def _num_bytes(size: int, bits: int) -> int:
    return size // 4 * bits // 2 + size % 4 if size >= _SCALE_BITS else 2 * size


def _encode(pieces: Sequence[Tensor], bits: int) -> list[Tensor]:
    """Return the bytes of each piece."""
    if not pieces:
        return []
    scales = _rounded_up(torch.stack([torch.linalg.vector_norm(piece, math.inf) for piece in pieces]))
    values = [piece / scale for piece, scale in zip(pieces, scales.to(pieces[0].dtype).unbind(), strict=True)]
    wholes = [len(piece) // 4 * 4 for piece in pieces]
    heads = _codes(torch.stack([v[:_SCALE_BITS] for v in values]), bits - 1) << 1
    heads |= scales.view(torch.int16)[:, None] >> _shifts(heads) & 1
    bodies = _codes(torch.cat([v[_SCALE_BITS:whole] for v, whole in zip(values, wholes, strict=True)]), bits)
    tails = _codes(torch.cat([v[whole:] for v, whole in zip(values, wholes, strict=True)]), _TAIL_BITS)
    parts = zip(
        _pack(heads.view(-1), bits).split(_HEAD_BYTES_A_BIT * bits),
        _pack(bodies, bits).split([(whole - _SCALE_BITS) * bits // 8 for whole in wholes]),
        tails.to(torch.uint8).split([len(piece) % 4 for piece in pieces]),
        strict=True,
    )
    return [torch.cat(part) for part in parts]


def _decode(buffers: Sequence[Tensor], sizes: Sequence[int], bits: int, dtype: torch.dtype) -> list[Tensor]:
    """Return the pieces, of so many elements, that are these bytes."""
    if not buffers:
        return []
    begin = _HEAD_BYTES_A_BIT * bits
    ends = [len(buffer) - size % 4 for buffer, size in zip(buffers, sizes, strict=True)]
    heads = _unpack(torch.cat([buffer[:begin] for buffer in buffers]), bits).view(-1, _SCALE_BITS)
    bodies = _unpack(torch.cat([buffer[begin:end] for buffer, end in zip(buffers, ends, strict=True)]), bits)
    tails = torch.cat([buffer[end:] for buffer, end in zip(buffers, ends, strict=True)]).to(torch.int16)
    scales = ((heads & 1) << _shifts(heads)).sum(1, dtype=torch.int16).view(torch.bfloat16).to(dtype)
    parts = zip(
        _values(heads >> 1, bits - 1, dtype).unbind(),
        _values(bodies, bits, dtype).split([size // 4 * 4 - _SCALE_BITS for size in sizes]),
        _values(tails, _TAIL_BITS, dtype).split([size % 4 for size in sizes]),
        strict=True,
    )
    return [torch.cat(part).mul_(scale) for part, scale in zip(parts, scales.unbind(), strict=True)]


def _shifts(like: Tensor) -> Tensor:
    """Return where in the scale the lowest bit of each of the first elements belongs."""
    return torch.arange(_SCALE_BITS, dtype=like.dtype, device=like.device)


def _rounded_up(scales: Tensor) -> Tensor:
    """Return the least numbers of bfloat16 that are no smaller."""
    rounded = scales.to(torch.bfloat16)
    return torch.where(rounded < scales, (rounded.view(torch.int16) + 1).view(torch.bfloat16), rounded)


def _codes(values: Tensor, bits: int) -> Tensor:
    """Return codes from 1 to 2^bits - 1 of values in [-1, 1]; any code of other values: then s is 0, inf or nan."""
    top = 2 ** (bits - 1) - 1
    magnitudes = values.abs().sqrt_().mul_(top).round_()
    return magnitudes.copysign_(values).to(torch.int16).add_(top + 1) & 2**bits - 1


def _values(codes: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    top = 2 ** (bits - 1) - 1
    roots = (codes - (top + 1)).to(dtype).div_(top)
    return roots.mul_(roots.abs())


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Return the bytes of a multiple of four codes: each four are one number of `bits` / 2 bytes."""
    numbers = torch.zeros(len(codes) // 4, dtype=torch.int64, device=codes.device)
    for i, column in enumerate(codes.view(-1, 4).unbind(1)):
        numbers |= column.to(torch.int64) << bits * i
    packed = torch.empty(len(numbers), bits // 2, dtype=torch.uint8, device=codes.device)
    for i, column in enumerate(packed.unbind(1)):
        column.copy_(numbers >> 8 * i & 255)
    return packed.view(-1)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    columns = packed.view(-1, bits // 2).unbind(1)
    numbers = torch.zeros(len(columns[0]), dtype=torch.int64, device=packed.device)
    for i, column in enumerate(columns):
        numbers |= column.to(torch.int64) << 8 * i
    codes = torch.empty(len(numbers), 4, dtype=torch.int16, device=packed.device)
    for i, column in enumerate(codes.unbind(1)):
        column.copy_(numbers >> bits * i & 2**bits - 1)
    return codes.view(-1)
