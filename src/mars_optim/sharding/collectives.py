"""Collectives under the name that the installed torch prefers."""
# torch.distributed is not typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from typing import Any

from torch import distributed as dist

# torch 2.13 has renamed it.
all_gather: Any = getattr(dist, "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor")
