"""One look for all figures: legible in print, for colour-blind readers and on white."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

INK = "#1b4f8a"
MUTED = "#a9b4c2"

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#b8578e", "#000000", "#a06a00", "#2f93c9", "#8a8400")
"""Okabe and Ito's colours for colour-blind readers, the light ones darkened so that they can be text on white."""

MARKERS = "osD^vPX"
_EXACT = "-exact"

TOKENS = EngFormatter(sep="")
"""Axis labels such as 400k and 1.6M."""


def hollow(optimizer: str) -> bool:
    """Whether the markers of an optimizer are outlines: those of exact mode."""
    return optimizer.endswith(_EXACT)


def line_index(optimizers: Sequence[str], optimizer: str) -> int:
    """Which colour and marker an optimizer has among `optimizers`: its exact mode has those of its approx mode."""
    families = list(dict.fromkeys(name.removesuffix(_EXACT) for name in optimizers))
    return families.index(optimizer.removesuffix(_EXACT))


def line_style(optimizers: Sequence[str], optimizer: str) -> dict[str, Any]:
    """How matplotlib draws an optimizer."""
    index = line_index(optimizers, optimizer)
    color = PALETTE[index % len(PALETTE)]
    return {
        "color": color,
        "marker": MARKERS[index % len(MARKERS)],
        "markerfacecolor": "white" if hollow(optimizer) else color,
        "linestyle": "--" if hollow(optimizer) else "-",
        "markersize": 4.5,
        "linewidth": 1.6,
    }


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of `width` x `height` inches."""
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, stem: Path) -> None:
    """Write `stem`.png and `stem`.svg, with a light grid behind the data and no box around it."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.savefig(stem.with_suffix(".png"), dpi=150)
    figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})


def label_ends(axes: Axes, ends: Sequence[tuple[str, str, float, float]]) -> None:
    """Name each curve at the right edge, highest first, moved apart where names would touch."""
    low, high = axes.get_ylim()
    gap = 0.045 * (high - low)
    ordered = sorted(ends, key=lambda end: -end[3])
    heights = [end[3] for end in ordered]
    for _ in range(100):
        for i in range(len(heights) - 1):
            if (overlap := gap - (heights[i] - heights[i + 1])) > 0:
                heights[i] += overlap / 2
                heights[i + 1] -= overlap / 2
    right = max(end[2] for end in ends) * 1.04
    for (name, color, x, y), height in zip(ordered, heights, strict=True):
        axes.plot([x, right], [y, height], color=color, linewidth=0.6, linestyle=":")
        axes.annotate(
            name,
            (right, height),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            color=color,
            fontsize=9,
            annotation_clip=False,
        )
    axes.set_xlim(0, right)
