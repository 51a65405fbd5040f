"""Settings of the C library's allocator."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # from glibc's malloc.h
_NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks instead of returning them to the kernel.

    A training step frees and allocates the same activations again; by default the kernel unmaps and zeroes all of
    their pages each time, about a quarter of the forward and backward pass of the default recipe (docs/log.md).
    Other C libraries are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)
