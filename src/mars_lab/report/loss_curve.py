"""The loss curve of one run."""

from pathlib import Path

from mars_lab.report.rows import read_rows
from mars_lab.report.style import INK, MUTED, TOKENS, new_figure, save


def draw(metrics: Path, stem: Path, title: str) -> None:
    """Training and validation loss of the run recorded in `metrics`, as `stem`.png and `stem`.svg."""
    rows = read_rows(metrics)
    training = [(row["tokens"], row["loss"]) for row in rows if "loss" in row]
    validation = [(row["tokens"], row["val_loss"]) for row in rows if "val_loss" in row]
    figure = new_figure(7.0, 4.2)
    axes = figure.subplots()
    axes.plot(*zip(*training, strict=True), color=MUTED, linewidth=1.0, label="training, each step")
    axes.plot(*zip(*validation, strict=True), color=INK, linewidth=2.0, marker="o", markersize=4, label="validation")
    tokens, loss = validation[-1]
    axes.annotate(f"{loss:.3f}", (tokens, loss), xytext=(6, 0), textcoords="offset points", va="center", color=INK)
    axes.set_title(title, loc="left")
    axes.set_xlabel("training tokens")
    axes.xaxis.set_major_formatter(TOKENS)
    axes.set_ylabel("loss, nats per token")
    axes.margins(x=0.02)
    axes.set_xlim(right=tokens * 1.1)
    axes.legend(frameon=False)
    save(figure, stem)
