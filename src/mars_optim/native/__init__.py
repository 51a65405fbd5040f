"""The native CPU kernels: C++ that knows neither Python nor torch, and the way to it."""

from .library import ABI_VERSION, Isa, NativeUnavailable, forced_isa, handle, opened

__all__ = ["ABI_VERSION", "Isa", "NativeUnavailable", "forced_isa", "handle", "opened"]
