r"""How pieces of matrices travel: as numbers, or as codes of a few bits an element.

The code q of an element x in a piece whose largest magnitude is s stands for

    s * sign(q) * (q / top)^2,  top = 2^(bits-1) - 1

so that it is off by at most s * (sqrt(|x| / s) / top + 1 / (4 top^2)). Four codes are `bits` / 2 bytes; s goes before
them as fp32. Where the piece has an inf or nan, s is one, and so is all that arrives.
"""
# torch.linalg and Tensor.split are not typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_SCALE_BYTES = 4
# A momentum's small singular values count in its polar factor as much as the large ones, and drown in its rounding;
# rounding the factor itself is an error of its own size. Together two bytes an element: one exchange in bfloat16.
_BITS_THERE, _BITS_BACK = 10, 6


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
        if self.bits is None:
            return sum(sizes)
        return sum(_SCALE_BYTES + -(-size // 4) * self.bits // 2 for size in sizes)

    def encode(self, pieces: Sequence[Tensor], device: torch.device) -> Tensor:
        """Return the buffer for 1-D pieces."""
        if self.bits is None:
            return torch.cat([torch.empty(0, dtype=self.dtype, device=device), *(p.to(self.dtype) for p in pieces)])
        if not pieces:
            return torch.empty(0, dtype=torch.uint8, device=device)
        lengths = [-(-len(p) // 4) * 4 for p in pieces]
        values = torch.zeros(sum(lengths), dtype=self.dtype, device=device)
        scales = torch.stack([torch.linalg.vector_norm(p, math.inf) for p in pieces]).float()
        for place, piece, scale in zip(values.split(lengths), pieces, scales.to(self.dtype).unbind(), strict=True):
            torch.div(piece.to(self.dtype), scale, out=place[: len(piece)])
        packed = _pack(_codes(values, self.bits), self.bits).split([length * self.bits // 8 for length in lengths])
        headers = scales.view(torch.uint8).split(_SCALE_BYTES)
        return torch.cat([part for pair in zip(headers, packed, strict=True) for part in pair])

    def decode(self, buffer: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Undo `encode` for pieces of so many elements."""
        if self.bits is None:
            return list(buffer.split(list(sizes)))
        if not sizes:
            return []
        lengths = [-(-size // 4) * 4 for size in sizes]
        parts = buffer.split([n for length in lengths for n in (_SCALE_BYTES, length * self.bits // 8)])
        scales = torch.cat(parts[0::2]).view(torch.float32).to(self.dtype)
        top = 2 ** (self.bits - 1) - 1
        codes = _unpack(torch.cat(parts[1::2]), self.bits).sub_(top + 1).to(self.dtype).div_(top)
        values = codes.mul_(codes.abs()).split(lengths)
        return [v[:size].mul_(scale) for v, size, scale in zip(values, sizes, scales.unbind(), strict=True)]

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


def _codes(values: Tensor, bits: int) -> Tensor:
    """Return codes from 1 to 2^bits - 1 of values in [-1, 1]; any code of other values: then s is 0, inf or nan."""
    top = 2 ** (bits - 1) - 1
    magnitudes = values.abs().sqrt_().mul_(top).round_()
    return magnitudes.copysign_(values).to(torch.int16).add_(top + 1)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Return the bytes of a multiple of four codes: each four are one number of `bits` / 2 bytes."""
    numbers = torch.zeros(len(codes) // 4, dtype=torch.int64, device=codes.device)
    for i, column in enumerate((codes & (2**bits - 1)).view(-1, 4).unbind(1)):
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
