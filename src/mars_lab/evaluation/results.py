"""What an evaluation found: a JSON file that grows with each evaluation of the same model, and tables of it."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mars_lab.errors import InputError
from mars_lab.evaluation.published import PUBLISHED
from mars_lab.evaluation.suite import NINE

Metrics = Mapping[str, float]


class Results:
    """The metrics of a model by number of shots and task, kept in `folder/results.json`.

    Raises:
        InputError: the folder holds those of another model, or of other settings.
    """

    def __init__(self, folder: Path, model: str, about: dict[str, Any]) -> None:
        self._path, self._model = folder / "results.json", model
        self.values: dict[str, Any] = {**about, "shots": {}}
        if self._path.exists():
            self.values = self._recorded(about)

    def _recorded(self, about: dict[str, Any]) -> dict[str, Any]:
        try:
            values = json.loads(self._path.read_text())
        except ValueError as error:
            raise InputError(f"{self._path} is damaged ({error}); delete it") from None
        for name, value in about.items():
            if values.get(name) != value:
                raise InputError(
                    f"{self._path} holds results of another {name} ({values.get(name)!r}, now {value!r}); choose "
                    "another --output"
                )
        return values

    def add(self, num_shots: int, metrics: Mapping[str, Metrics]) -> None:
        """Enter metrics and write file and tables."""
        self.values["shots"].setdefault(str(num_shots), {}).update(metrics)
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(self.values, indent=1) + "\n")
        partial.replace(self._path)
        (self._path.parent / "results.md").write_text(self.tables() + "\n")

    def tables(self) -> str:
        """Markdown: the nine tasks beside the published rows, then all other tasks."""
        shots: Mapping[str, Mapping[str, Metrics]] = self.values["shots"]
        nine = {task.name for task in NINE}
        found = {name for metrics in shots.values() for name in metrics}
        rows = [(num, name, metrics[name]) for num, metrics in shots.items() for name in metrics if name not in nine]
        parts = [self._suite_table(shots)] if found & nine else []
        return "\n\n".join([*parts, _other_table(rows)] if rows else parts)

    def _suite_table(self, shots: Mapping[str, Mapping[str, Metrics]]) -> str:
        lines: list[Sequence[str]] = [("accuracy, %", *(task.label for task in NINE), "mean of all")]
        for num, metrics in shots.items():
            own = {task.name: 100 * accuracy(metrics[task.name]) for task in NINE if task.name in metrics}
            if own:
                lines.append(_suite_row(f"{self._model}, {num}-shot", own))
        lines += [_suite_row(f"published: {name}, 0-shot", values) for name, values in PUBLISHED.items()]
        return markdown(lines)


def accuracy(metrics: Metrics) -> float:
    """Normalised by the answers' lengths where the task has that, as in the published rows."""
    return metrics["acc_norm"] if "acc_norm" in metrics else metrics["acc"]


def _suite_row(name: str, values: Mapping[str, float]) -> tuple[str, ...]:
    mean = f"{sum(values.values()) / len(NINE):.2f}" if len(values) == len(NINE) else "–"
    return (name, *(f"{values[task.name]:.2f}" if task.name in values else "–" for task in NINE), mean)


def _other_table(rows: Sequence[tuple[str, str, Metrics]]) -> str:
    lines = [("task", "shots", "questions", "metrics (± standard error)")]
    for num, name, metrics in rows:
        count = int(metrics["num_questions"])
        shown = [_shown(key, value, count) for key, value in metrics.items() if key != "num_questions"]
        lines.append((name, num, str(count), ", ".join(shown)))
    return markdown(lines)


def _shown(key: str, value: float, count: int) -> str:
    if not key.startswith("acc"):
        return f"{key} {value:.4g}"
    error = f" ± {100 * math.sqrt(value * (1 - value) / (count - 1)):.1f}" if count > 1 else ""
    return f"{key} {100 * value:.1f}{error} %"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table; the first of `lines` is its head."""
    head, *body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([head, "|" + "---|" * len(lines[0]), *body])
