"""Run folders and records made up for tests of the report: what a training writes, with losses that are known."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mars_lab.report.curve import Curve
from mars_lab.report.run_record import RunRecord

CONFIG: dict[str, Any] = {
    "task": {"model": {"num_layers": 2, "num_heads": 2, "width": 16}, "data": {"corpus": "sotu", "cache": "data"}},
    "optimizer": {"name": "adamw", "mode": "approx", "lr": 0.1, "lr_1d": None, "betas": [0.9, 0.95], "gamma": 0.025},
    "train": {"num_steps": 4, "batch_size": 2, "seed": 0},
}


def config(optimizer: str = "adamw", *, lr: float = 0.1, seed: int = 0, **options: Any) -> dict[str, Any]:
    """`CONFIG` with another optimizer, rate, seed and further options of the optimizer."""
    values = copy.deepcopy(CONFIG)
    mode = "exact" if optimizer.endswith("-exact") else "approx"
    values["optimizer"] |= {"name": optimizer.removesuffix("-exact"), "mode": mode, "lr": lr, **options}
    values["train"]["seed"] = seed
    return values


def write_run(
    folder: Path, values: dict[str, Any], val_losses: Sequence[float], summary: dict[str, Any] | None = None
) -> Path:
    """A run with 10 tokens and half a second a step and an evaluation after each; without `summary` unless given."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(values))
    rows: list[dict[str, Any]] = []
    for step, loss in enumerate(val_losses):
        at = {"step": step, "tokens": 10 * step, "seconds": 0.5 * step}
        if step:
            rows.append({**at, "loss": loss + 0.1, "lr": 0.1, "memory_mib": 100.0 + step})
        rows.append({**at, "val_loss": loss})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def finished_run(folder: Path, values: dict[str, Any], val_losses: Sequence[float]) -> Path:
    """The same, with the summary of a run that came to its end."""
    return write_run(folder, values, val_losses, {"val_loss": val_losses[-1], "tokens": 10 * (len(val_losses) - 1)})


def record(optimizer: str, seed: int, num_points: int, *, lr: float = 0.1) -> RunRecord:
    """A run of `num_points` steps in memory, its loss falling from 8 to 3 with noise and one spike."""
    generator = np.random.default_rng(seed)
    steps = np.arange(1, num_points + 1, dtype=np.float64)
    loss = 3 + 5 * np.exp(-6 * steps / num_points) + 0.1 * generator.standard_normal(num_points)
    loss[num_points // 2] = 20.0
    curves = {
        "loss": Curve(steps, 4096 * steps, 0.1 * steps, loss),
        "val_loss": Curve(steps, 4096 * steps, 0.1 * steps, loss),
    }
    summary = {"val_loss": float(loss[-1])}
    name = f"{optimizer}-{lr:g}-{seed}"
    return RunRecord(name, config(optimizer, lr=lr, seed=seed), summary, False, curves, 40960.0, 512.0)
