"""The published members of the MARS family: each name stands for a preconditioner and an update scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """What a `mars_type` stands for. The gradient correction is common to all of them."""

    preconditioner: str
    update_scale: str


PRESETS: Mapping[str, Preset] = {
    "adamw": Preset(preconditioner="adamw", update_scale="none"),  # MARS, Algorithm 2
    "lion": Preset(preconditioner="lion", update_scale="none"),  # MARS, Algorithm 3
    "shampoo": Preset(preconditioner="polar", update_scale="spectral"),  # MARS, Algorithm 4
    "m": Preset(preconditioner="polar", update_scale="rms"),  # MARS-M
}


def preset(mars_type: str) -> Preset:
    """Look up a preset by name; `"mars-adamw"` and `"adamw"` are the same.

    Raises:
        ValueError: the name is not one of the four types.
    """
    found = PRESETS.get(str(mars_type).lower().removeprefix("mars-"))
    if found is None:
        raise ValueError(f"mars_type must be one of {', '.join(PRESETS)}; got {mars_type!r}")
    return found
