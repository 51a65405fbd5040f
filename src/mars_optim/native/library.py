"""The native CPU kernels as a C library: finding it, and the levels of the instruction set it was compiled for.

Who calls a function of it mirrors that function's arguments: `backends/native_library.py` the optimizer's steps,
`polar/native_product.py` the products of matrices. `csrc/abi.h` is the other half of both.
"""

from __future__ import annotations

import ctypes
import os
import sys
from enum import IntEnum
from functools import cache
from pathlib import Path

ABI_VERSION = 4

_NAME = "_native.dll" if sys.platform == "win32" else "_native.so"


class NativeUnavailable(RuntimeError):  # noqa: N818 - a state of the installation, not a mistake
    """The kernels cannot run here; the message names the cause and the remedy."""


class Isa(IntEnum):
    """Levels of the instruction set."""

    BASELINE = 0
    AVX2 = 1
    AVX512 = 2


@cache
def handle() -> ctypes.CDLL:
    """Return the library.

    Raises:
        NativeUnavailable: the message names the cause and the remedy.
    """
    return opened(Path(__file__).with_name(_NAME))


def opened(path: Path) -> ctypes.CDLL:
    """Return the library at `path`; raises as `handle`."""
    if ctypes.sizeof(ctypes.c_void_p) != 8:
        raise NativeUnavailable("the native kernels need a 64-bit Python; use a 64-bit build of it")
    if not path.exists():
        raise NativeUnavailable(
            f"the native kernels were not built ({path.name} is missing); install a C++17 compiler and mars-optim again"
        )
    try:
        library = ctypes.CDLL(str(path))
        version = int(library.mars_abi_version())
    except (OSError, AttributeError) as error:
        raise NativeUnavailable(f"{path.name} does not load ({error}); reinstall mars-optim on this machine") from error
    if version != ABI_VERSION:
        raise NativeUnavailable(
            f"{path.name} has interface version {version}, this mars-optim needs {ABI_VERSION}; reinstall mars-optim"
        )
    return library


def forced_isa() -> Isa | None:
    """Return the level that MARS_NATIVE_ISA (baseline, avx2, avx512) names, None where it is not set.

    Raises:
        NativeUnavailable: it names none.
    """
    name = os.environ.get("MARS_NATIVE_ISA", "")
    if not name:
        return None
    names = [level.name.lower() for level in Isa]
    if name not in names:
        raise NativeUnavailable(f"MARS_NATIVE_ISA is {name!r}; it must be one of {', '.join(names)}, or unset")
    return Isa(names.index(name))
