"""What the report knows of a run: its configuration, its curves and what it came to, read from its folder alone."""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from mars_lab.errors import InputError
from mars_lab.report.curve import Curve
from mars_lab.report.rows import read_rows

TRAINING_LOSS, VALIDATION_LOSS = "loss", "val_loss"
POINTS_KEPT = 4000
"""Of a training curve, in memory; a page shows fewer."""
TUNING_FOLDER = "tuning"
"""Runs in a folder of this name chose hyperparameters; they are in no table of results."""


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder tells of it.

    `curves` by metric: `loss`, and whatever evaluations measured (`val_loss`, `val_accuracy`, ...).
    `tokens_per_second` is the median over steps, `memory_mib` the highest measured; None where nothing was.
    """

    name: str
    config: dict[str, Any]
    summary: dict[str, Any] | None
    is_tuning: bool
    curves: dict[str, Curve]
    tokens_per_second: float | None
    memory_mib: float | None

    @property
    def optimizer(self) -> str:
        """As `mars compare` calls it."""
        options = self.config["optimizer"]
        return options.get("label") or options["name"] + ("-exact" if options.get("mode") == "exact" else "")

    @property
    def seed(self) -> int:
        """Of the training."""
        return self.config["train"]["seed"]

    @property
    def state(self) -> str:
        """`finished`, `diverged`, `pruned`, `unfinished` or `empty`."""
        if not self.curves:
            return "empty"
        if self.summary is None:
            return "unfinished"
        return next((state for state in ("diverged", "pruned") if self.summary.get(state)), "finished")

    @property
    def final_loss(self) -> float | None:
        """The last validation loss of a finished run."""
        return self.summary[VALIDATION_LOSS] if self.summary and self.state == "finished" else None

    @property
    def tokens(self) -> float:
        """Training targets seen."""
        return max((float(curve.tokens[-1]) for curve in self.curves.values()), default=0.0)

    @property
    def seconds(self) -> float:
        """Time in steps."""
        return max((float(curve.seconds[-1]) for curve in self.curves.values()), default=0.0)


def read(path: Path, name: str) -> RunRecord:
    """The run in the folder `path`, to be called `name`.

    Raises:
        InputError: a file of it is damaged (a torn last line of the metrics is not: a kill leaves one).
    """
    rows = _rows(path / "metrics.jsonl")
    training = [row for row in rows if TRAINING_LOSS in row]
    measured = [row for row in rows if TRAINING_LOSS not in row]
    curves = {TRAINING_LOSS: _curve(training, TRAINING_LOSS).thinned(POINTS_KEPT)} if training else {}
    for metric in dict.fromkeys(key for row in measured for key in row if key.startswith("val_")):
        curves[metric] = _curve([row for row in measured if metric in row], metric)
    curves = {metric: curve for metric, curve in curves.items() if len(curve)}
    # The first step also pays for warming up.
    speeds = [
        (after["tokens"] - before["tokens"]) / (after["seconds"] - before["seconds"])
        for before, after in pairwise(training)
        if after["seconds"] > before["seconds"]
    ]
    memory = [row["memory_mib"] for row in training if "memory_mib" in row]
    config = _json(path / "config.json")
    if not isinstance(config, dict) or not {"optimizer", "train"} <= config.keys():
        raise InputError(f"{path / 'config.json'} is no configuration of a run; leave this folder out")
    return RunRecord(
        name,
        config,
        _json(path / "summary.json") if (path / "summary.json").exists() else None,
        is_tuning=path.resolve().parent.name == TUNING_FOLDER,
        curves=curves,
        tokens_per_second=median(speeds) if speeds else None,
        memory_mib=max(memory, default=None),
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        return read_rows(path)
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); restore it, or leave this run out") from None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); restore it, or leave this run out") from None


def _curve(rows: list[dict[str, Any]], metric: str) -> Curve:
    """The points at which `metric` is a number: what diverges ends where it was last one."""
    table = np.array([[row[key] for key in ("step", "tokens", "seconds", metric)] for row in rows], dtype=np.float64)
    return Curve(*table[np.isfinite(table[:, 3])].T.copy())
