"""What the runs of a table or figure came to, beside what was published, and whether the published orderings held."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, stdev
from typing import Any

import numpy as np

from mars_lab.evaluation.results import accuracy
from mars_lab.evaluation.suite import NINE
from mars_lab.report.run_record import VALIDATION_LOSS, RunRecord
from mars_lab.report.tables import Table
from mars_lab.reproduce.exhibit import (
    MEAN,
    Accuracy,
    Exhibit,
    Loss,
    Ordering,
    Quantity,
    StepTime,
    TaskAccuracy,
    is_better,
)

Answers = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Metrics by number of shots and task, as `mars evaluate` keeps them."""


@dataclass(frozen=True)
class Run:
    """A run, finished or diverged, and what it was asked."""

    record: RunRecord
    answers: Answers


@dataclass(frozen=True)
class Cell:
    """A quantity of a row: published, and one value a seed; `diverged` counts seeds without one."""

    label: str
    quantity: Quantity
    published: float | None
    values: tuple[float, ...]
    diverged: int

    @property
    def mean(self) -> float | None:
        return fmean(self.values) if self.values else None

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over seeds."""
        return stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Verdict:
    """Whether an ordering held: None where a side has no value. `gap` is positive where it did."""

    ordering: Ordering
    gap: float | None
    spread: float | None

    @property
    def held(self) -> bool | None:
        return None if self.gap is None else self.gap > 0


def cells(exhibit: Exhibit, quantities: Sequence[Quantity], runs: Mapping[str, Sequence[Run]]) -> list[Cell]:
    """By quantity, then by row; `runs` are those of each recipe."""
    return [
        Cell(
            exhibit.label(row),
            quantity,
            row.published.get(quantity),
            tuple(v for run in runs.get(row.recipe, ()) if (v := measured(quantity, run)) is not None),
            sum(run.record.state == "diverged" for run in runs.get(row.recipe, ())),
        )
        for quantity in quantities
        for row in exhibit.rows
    ]


def measured(quantity: Quantity, run: Run) -> float | None:
    """`quantity` of `run`; None where the run diverged or has no such thing."""
    record = run.record
    if record.state != "finished":
        return None
    match quantity:
        case Loss(share):
            return _lowest(record, share)
        case Accuracy():
            curve = record.curves.get("val_accuracy")
            return None if curve is None else 100 * float(curve.value.max())
        case StepTime():
            if record.tokens_per_second is None:
                return None
            curve = record.curves[VALIDATION_LOSS]
            return 1000 * float(curve.tokens[-1] / curve.steps[-1]) / record.tokens_per_second
        case TaskAccuracy(task, shots):
            asked = run.answers.get(str(shots), {})
            names = [one.name for one in NINE] if task == MEAN else [task]
            found = [100 * accuracy(asked[name]) for name in names if name in asked]
            return fmean(found) if len(found) == len(names) else None


def verdicts(exhibit: Exhibit, found: Sequence[Cell]) -> list[Verdict]:
    """Of every ordering that was published."""
    by_place = {(cell.label, cell.quantity): cell for cell in found}
    return [_verdict(ordering, by_place) for ordering in exhibit.orderings()]


def table(found: Sequence[Cell]) -> Table:
    """A row of the exhibit and a quantity a line."""
    rows = [
        [
            cell.quantity.name,
            cell.label,
            "" if cell.published is None else _digits(cell.quantity, cell.published, is_published=True),
            _here(cell),
            str(len(cell.values)) if cell.values else "",
        ]
        for cell in found
    ]
    return Table(["quantity", "row", "published", "here", "seeds"], rows, numeric=(2, 3, 4))


def ordering_table(found: Sequence[Verdict]) -> Table:
    """An ordering a line."""
    return Table(["ordering", "quantity", "published", "here"], [_ordering_row(v) for v in found], numeric=())


def summary(found: Sequence[Verdict]) -> str:
    """How many orderings held, in words."""
    counts = {held: sum(verdict.held is held for verdict in found) for held in (True, False, None)}
    if not found:
        return "Nothing was published of the order of these rows."
    missing = f"; {counts[None]} could not be measured" if counts[None] else ""
    return f"Of {len(found)} published orderings {counts[True]} held here and {counts[False]} did not{missing}."


def as_json(found: Sequence[Cell], judged: Sequence[Verdict]) -> dict[str, Any]:
    """Everything in the tables, with the value of each seed."""
    return {
        "rows": [
            {
                "row": cell.label,
                "quantity": cell.quantity.name,
                "published": cell.published,
                "values": list(cell.values),
                "mean": cell.mean,
                "spread": cell.spread,
                "diverged": cell.diverged,
            }
            for cell in found
        ],
        "orderings": [
            {
                "better": verdict.ordering.better,
                "worse": verdict.ordering.worse,
                "quantity": verdict.ordering.quantity.name,
                "published_gap": verdict.ordering.gap,
                "gap": verdict.gap,
                "held": verdict.held,
            }
            for verdict in judged
        ],
    }


def _lowest(record: RunRecord, share: float) -> float | None:
    curve = record.curves.get(VALIDATION_LOSS)
    if curve is None:
        return None
    is_trained = curve.tokens > 0
    tokens, value = curve.tokens[is_trained], curve.value[is_trained]
    if not len(tokens):
        return None
    until = int(np.abs(tokens - share * record.tokens).argmin())
    return float(value[: until + 1].min())


def _verdict(ordering: Ordering, found: Mapping[tuple[str, Quantity], Cell]) -> Verdict:
    sides = [found.get((label, ordering.quantity)) for label in (ordering.better, ordering.worse)]
    means = [side.mean if side is not None else None for side in sides]
    if means[0] is None or means[1] is None:
        return Verdict(ordering, None, None)
    gap = abs(means[0] - means[1])
    spreads = [side.spread for side in sides if side is not None and side.spread is not None]
    return Verdict(
        ordering,
        gap if is_better(ordering.quantity, means[0], means[1]) else -gap,
        math.hypot(*spreads) if len(spreads) == 2 else None,
    )


def _ordering_row(verdict: Verdict) -> list[str]:
    ordering = verdict.ordering

    digits = partial(_digits, ordering.quantity)
    published = "yes" if ordering.gap is None else f"yes, by {digits(ordering.gap)}"
    here = "not measured"
    if verdict.gap is not None:
        here = f"{'yes' if verdict.held else 'no'}, by {digits(abs(verdict.gap))}"
        here += "" if verdict.spread is None else f" ± {digits(verdict.spread)}"
    return [f"{ordering.better} before {ordering.worse}", ordering.quantity.name, published, here]


def _here(cell: Cell) -> str:
    diverged = f"{cell.diverged} diverged" if cell.diverged else ""
    if cell.mean is None:
        return diverged
    spread = "" if cell.spread is None else f" ± {_digits(cell.quantity, cell.spread)}"
    return f"{_digits(cell.quantity, cell.mean)}{spread}" + (f" ({diverged})" if diverged else "")


def _digits(quantity: Quantity, value: float, *, is_published: bool = False) -> str:
    if is_published and not (isinstance(quantity, TaskAccuracy) and quantity.task == MEAN):
        return f"{value:g}"
    if isinstance(quantity, Loss):
        return f"{value:.4f}"
    return f"{value:.1f}" if isinstance(quantity, StepTime) else f"{value:.2f}"
