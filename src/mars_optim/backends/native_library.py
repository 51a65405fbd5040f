"""The optimizer's steps in the native library: the memory layout of their arguments.

`native/csrc/abi.h` is the other half of this file. Nothing here knows tensors: operands are addresses.
"""

from __future__ import annotations

import ctypes
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from functools import cache
from pathlib import Path
from typing import Any

from mars_optim.native import Isa, NativeUnavailable, forced_isa, handle, opened

# A writable buffer, or its address.
Memory = int | bytearray | memoryview

Q8_BLOCK = 128  # elements that share one scale

# From this many elements on a tensor is measured by itself: then its `next` may be the `prev` of any that comes after
# it in the call, which is worked through from the last record to the first.
WINDOW = 1 << 17


class Op(IntEnum):
    """What a call does; `csrc/steps.h` and `csrc/norms.h` have the equations."""

    PRODUCTS = 0
    ADAMW = 1
    LION = 2
    MOMENTUM = 3
    DESCEND = 4


class Arithmetic(IntEnum):
    """The type that everything is computed in."""

    FLOAT = 0
    DOUBLE = 1


class Format(IntEnum):
    """How an operand is stored. Q8: 8-bit codes with one fp32 scale to `Q8_BLOCK` elements."""

    F32 = 0
    F64 = 1
    BF16 = 2
    F16 = 3
    Q8 = 4


class Rounding(IntEnum):
    """How 16-bit parameters are rounded. The last three keep what was lost in the companion buffer `extra`."""

    NEAREST = 0
    STOCHASTIC = 1
    KAHAN = 2
    REMAINDER16 = 3
    REMAINDER8 = 4


class Flag(IntFlag):
    """Variants of a step."""

    ONE_BUFFER = 1
    AMSGRAD = 2
    STOCHASTIC_M = 4
    STOCHASTIC_V = 8


class Call(ctypes.Structure):
    """What the tensors of one call have in common."""

    _fields_ = (
        ("op", ctypes.c_int32),
        ("arithmetic", ctypes.c_int32),
        ("x_format", ctypes.c_int32),
        ("g_format", ctypes.c_int32),
        ("prev_format", ctypes.c_int32),
        ("m_format", ctypes.c_int32),
        ("v_format", ctypes.c_int32),
        ("out_format", ctypes.c_int32),
        ("rounding", ctypes.c_int32),
        ("flags", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("beta1", ctypes.c_double),
        ("beta2", ctypes.c_double),
        ("eps", ctypes.c_double),
        ("clip_norm", ctypes.c_double),
    )


# A tensor's record in order: the element count, addresses (0: absent), the random key, then doubles.
RECORD_FIELDS = (
    "n",
    "x",
    "extra",
    "g",
    "prev",
    "prev_scale",
    "next",
    "next_scale",
    "m",
    "m_scale",
    "v",
    "v_scale",
    "vmax",
    "vmax_scale",
    "out",
    "key",
    "a",
    "b",
    "ratio",
    "we",
    "wg",
    "decay",
    "step_size",
    "inv_sqrt_bias2",
    "g_norm",
    "prev_norm",
)
RECORD = struct.Struct("=q15Q10d")


def pack(columns: Sequence[array[Any]]) -> bytearray:
    """Return records from their fields' columns in the order of `RECORD_FIELDS`: arrays of "Q", then of "d"."""
    records = bytearray(RECORD.size * len(columns[0]))
    words = {code: memoryview(records).cast(code) for code in ("Q", "d")}
    for i, column in enumerate(columns):
        words[column.typecode][i :: len(columns)] = column
    return records


_MEANINGS = {
    1: "the call's op, formats, rounding or sums do not go together, or a `next` is a `prev` that is not read before",
    2: "this CPU does not have that level of the instruction set",
    3: "out of memory",
}


@dataclass(frozen=True)
class Library:
    """The loaded kernels at one level of the instruction set."""

    handle: ctypes.CDLL
    isa: Isa

    def run(
        self, call: Call, records: Memory, count: int, sums: Memory | None = None, has_begun: bytearray | None = None
    ) -> None:
        """Work through `count` records, packed by `RECORD`.

        PRODUCTS writes three doubles a record to `sums`. Operations that clip write g.g, or a little more, to the first
        of them. The byte `has_begun` becomes 1 before anything else is written: it tells when an interruption came.

        Blocks until done, without the GIL.

        Raises:
            RuntimeError: where the library refuses the call.
        """
        if count == 0:
            return
        outputs = (None if buffer is None else _address(buffer) for buffer in (sums, has_begun))
        status = self.handle.mars_run(self.isa, ctypes.byref(call), _address(records), count, *outputs)
        if status != 0:
            raise RuntimeError(f"native kernels refused the call: {_MEANINGS[status]}; got {_describe(call)}")

    def add(self, addresses: array[int], increment: float, *, is_double: bool) -> list[float]:
        """Add to the fp32 or fp64 numbers that lie at these addresses, each by itself; return what they are then."""
        values = array("d", bytes(8 * len(addresses)))
        where, count = addresses.buffer_info()
        self.handle.mars_add(where, count, is_double, increment, values.buffer_info()[0])
        return values.tolist()


def run(
    call: Call, records: Memory, count: int, sums: Memory | None = None, has_begun: bytearray | None = None
) -> None:
    """Run on the library that `load` gives; see `Library.run`."""
    load().run(call, records, count, sums, has_begun)


@cache
def load(isa: Isa | None = None) -> Library:
    """Return the library at the level `isa`, by default MARS_NATIVE_ISA (baseline, avx2, avx512) or the CPU's best.

    Raises:
        NativeUnavailable: the message names the cause and the remedy.
    """
    return _at_level(handle(), isa)


def library_at(path: Path) -> Library:
    """Return the library of another build; raises as `load`."""
    return _at_level(opened(path), None)


def _at_level(library: ctypes.CDLL, isa: Isa | None) -> Library:
    library.mars_run.argtypes = (
        ctypes.c_int32,
        ctypes.POINTER(Call),
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_void_p,
        ctypes.c_void_p,
    )
    library.mars_add.argtypes = (
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int32,
        ctypes.c_double,
        ctypes.c_void_p,
    )
    library.mars_add.restype = None
    levels = [level for level in Isa if library.mars_isa_levels() >> level & 1]
    wanted = isa if isa is not None else forced_isa()
    if wanted is None:
        return Library(library, levels[-1])
    if wanted not in levels:
        raise NativeUnavailable(
            f"the native kernels have no level {wanted.name.lower()} on this CPU, which has "
            f"{', '.join(level.name.lower() for level in levels)}; unset MARS_NATIVE_ISA"
        )
    return Library(library, wanted)


@cache
def loaded() -> Library | None:
    """Return what `load` does; None where the kernels cannot run."""
    try:
        return load()
    except NativeUnavailable:
        return None


def _address(buffer: Memory) -> int:
    return buffer if isinstance(buffer, int) else ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def _describe(call: Call) -> str:
    return ", ".join(f"{field[0]}={getattr(call, field[0])}" for field in Call._fields_)
