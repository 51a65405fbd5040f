"""The loss curve of one run, and its accuracy where it has one."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from mars_lab.report.rows import read_rows
from mars_lab.report.style import INK, MUTED, TOKENS, new_figure, save


def draw(metrics: Path, stem: Path, *, title: str, unit: str = "token") -> None:
    """Training and validation loss (and accuracy) of the run in `metrics` by `unit`s, as `stem`.png and `stem`.svg."""
    rows = read_rows(metrics)
    training = [(row["tokens"], row["loss"]) for row in rows if "loss" in row]
    validation = [(row["tokens"], row["val_loss"]) for row in rows if "val_loss" in row]
    has_accuracy = any("val_accuracy" in row for row in rows)
    figure = new_figure(7.0, 7.2 if has_accuracy else 4.2)
    axes, *others = figure.subplots(1 + has_accuracy, squeeze=False)[:, 0]
    axes.plot(*zip(*training, strict=True), color=MUTED, linewidth=1.0, label="training, each step")
    axes.plot(*zip(*validation, strict=True), color=INK, linewidth=2.0, marker="o", markersize=4, label="validation")
    tokens, loss = validation[-1]
    axes.annotate(f"{loss:.3f}", (tokens, loss), xytext=(6, 0), textcoords="offset points", va="center", color=INK)
    axes.set_title(title, loc="left")
    axes.set_xlabel(f"training {unit}s")
    axes.xaxis.set_major_formatter(TOKENS)
    axes.set_ylabel(f"loss, nats per {unit}")
    axes.margins(x=0.02)
    axes.set_xlim(right=tokens * 1.1)
    axes.legend(frameon=False)
    for other in others:
        _draw_accuracy(other, rows, f"training {unit}s")
        other.set_xlim(axes.get_xlim())
    save(figure, stem)


def _draw_accuracy(axes: Axes, rows: list[dict[str, Any]], label: str) -> None:
    for name, text, color in (
        ("train_accuracy", "training images, not augmented", MUTED),
        ("val_accuracy", "test", INK),
    ):
        points = [(row["tokens"], 100 * row[name]) for row in rows if name in row]
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), color=color, linewidth=2.0, marker="o", markersize=4, label=text)
        if name == "val_accuracy":
            axes.annotate(
                f"{points[-1][1]:.1f}", points[-1], xytext=(6, 0), textcoords="offset points", va="center", color=INK
            )
    axes.set_xlabel(label)
    axes.xaxis.set_major_formatter(TOKENS)
    axes.set_ylabel("accuracy, percent")
    axes.legend(frameon=False)
