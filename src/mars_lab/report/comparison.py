"""Several optimizers side by side: table and figure."""

import statistics
from collections.abc import Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mars_lab.report.rows import read_rows
from mars_lab.report.style import TOKENS, label_ends, line_style, new_figure, save


def aggregate(runs: Path) -> list[dict[str, Any]]:
    """One entry per optimizer of the runs in `runs` (JSON lines), the lowest mean validation loss first.

    The mean and the sample standard deviation are over the seeds at the best learning rate. That rate was chosen
    with the first seed, which is among them: the mean is optimistic by a little, for all optimizers alike.
    """
    entries = [
        _entry(runs.parent, name, list(rows))
        for name, rows in groupby(read_rows(runs), key=lambda row: row["optimizer"])
    ]
    return sorted(entries, key=lambda entry: (entry["val_loss"] is None, entry["val_loss"]))


def _entry(folder: Path, name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    finished = [row for row in rows if row["val_loss"] is not None]
    entry: dict[str, Any] = {"optimizer": name, "runs": len(rows), "diverged": len(rows) - len(finished)}
    if not finished:
        return {**entry, "val_loss": None}
    first_seed = rows[0]["seed"]
    lr = min((row for row in finished if row["seed"] == first_seed), key=lambda row: row["val_loss"])["lr"]
    chosen = [row for row in finished if row["lr"] == lr]
    losses = [row["val_loss"] for row in chosen]
    tried = sorted(row["lr"] for row in rows if row["seed"] == first_seed)
    return {
        **entry,
        "val_loss": statistics.fmean(losses),
        "spread": statistics.stdev(losses) if len(losses) > 1 else None,
        "seeds": len(losses),
        "lr": lr,
        "lrs_tried": tried,
        "lr_at_edge": len(tried) > 1 and lr in (tried[0], tried[-1]),
        "gradient_evaluations_per_step": chosen[0]["gradient_evaluations_per_step"],
        "tokens": chosen[0]["tokens"],
        "milliseconds_per_step": 1000
        * statistics.median(t for row in chosen for t in _step_times(folder / row["folder"])),
        "folders": [row["folder"] for row in chosen],
    }


def _step_times(run: Path) -> list[float]:
    """Seconds of each training step but the first, which also pays for warming up."""
    seconds = [row["seconds"] for row in read_rows(run / "metrics.jsonl") if "loss" in row]
    return [after - before for before, after in pairwise(seconds)]


def table(entries: Sequence[dict[str, Any]]) -> str:
    """The entries of `aggregate` as a Markdown table with a line on how to read it."""
    lines = [
        "| optimizer | validation loss | learning rate | runs | gradients a step | ms a step |",
        "|---|---|---|---|---|---|",
    ]
    for entry in entries:
        runs = f"{entry['runs']}" + (f" ({entry['diverged']} diverged)" if entry["diverged"] else "")
        if entry["val_loss"] is None:
            lines.append(f"| {entry['optimizer']} | diverged | | {runs} | | |")
            continue
        spread = "" if entry["spread"] is None else f" ± {entry['spread']:.3f}"
        lines.append(
            f"| {entry['optimizer']} | {entry['val_loss']:.3f}{spread} | {entry['lr']:g}{'*' * entry['lr_at_edge']} "
            f"| {runs} | {entry['gradient_evaluations_per_step']} | {entry['milliseconds_per_step']:.0f} |"
        )
    note = (
        "\nMean ± standard deviation over seeds of the last validation loss (nats per token), at the rate that "
        "was best with the first seed. Each optimizer had the same number of runs and of tokens. ms a step is the "
        "median, evaluation not counted; exact mode computes two gradients a step."
    )
    if any(entry.get("lr_at_edge") for entry in entries):
        note += " * The best rate is at the edge of those tried; a wider grid may find a better one."
    return "\n".join([*lines, note, ""])


def draw(runs: Path, stem: Path) -> None:
    """Validation loss against tokens and against time, as `stem`.png and `stem`.svg.

    A line is the mean over seeds at the best learning rate, its band reaches from the lowest to the highest seed.
    A colour and marker is an optimizer, dashes are its exact mode.
    """
    entries = [entry for entry in aggregate(runs) if entry["val_loss"] is not None]
    figure = new_figure(11.0, 5.4)
    by_tokens, by_time = figure.subplots(1, 2, sharey=True)
    names = [entry["optimizer"] for entry in entries]
    ends: list[tuple[str, str, float, float, float]] = []
    ceiling = 0.0
    for entry in entries:
        style = line_style(names, entry["optimizer"])
        color = style["color"]
        curves = np.array([_validation(runs.parent / folder / "metrics.jsonl") for folder in entry["folders"]])
        tokens, seconds, loss = curves.mean(axis=0)
        lowest, highest = curves[:, 2].min(axis=0), curves[:, 2].max(axis=0)
        for axes, x in ((by_tokens, tokens), (by_time, seconds)):
            axes.fill_between(x, lowest, highest, color=color, alpha=0.15, linewidth=0)
            axes.plot(x, loss, **style)
        ends.append((entry["optimizer"], color, tokens[-1], seconds[-1], loss[-1]))
        # The first quarter, where every loss falls from log(vocabulary), would flatten the part that differs.
        ceiling = max(ceiling, loss[-(-len(loss) // 4)])
    floor = min(end[-1] for end in ends)
    by_tokens.set_ylim(floor - 0.08 * (ceiling - floor), ceiling + 0.02)
    by_tokens.set_ylabel("validation loss, nats per token")
    by_tokens.set_xlabel("training tokens")
    by_tokens.xaxis.set_major_formatter(TOKENS)
    by_time.set_xlabel("time in training steps, seconds")
    by_tokens.set_title("Loss against tokens", loc="left")
    by_time.set_title("Loss against wall-clock", loc="left")
    label_ends(by_tokens, [(name, color, tokens, loss) for name, color, tokens, _, loss in ends])
    label_ends(by_time, [(name, color, seconds, loss) for name, color, _, seconds, loss in ends])
    save(figure, stem)


def _validation(metrics: Path) -> list[list[float]]:
    """Tokens, seconds and validation loss at each evaluation."""
    rows = [row for row in read_rows(metrics) if "val_loss" in row]
    return [[row[key] for row in rows] for key in ("tokens", "seconds", "val_loss")]
