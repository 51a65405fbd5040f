"""One look for all figures: legible in print, for colour-blind readers and on white."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

INK = "#1b4f8a"
MUTED = "#a9b4c2"

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#b37400", "#56b4e9")
"""Okabe and Ito's colours for colour-blind readers, the orange darkened so that it can be text on white."""

TOKENS = EngFormatter(sep="")
"""Axis labels such as 400k and 1.6M."""


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
