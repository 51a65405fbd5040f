"""What a table or figure is: the runs it needs, the quantities it compares, and what was published of them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations

from mars_lab.evaluation.suite import BY_NAME

MEAN = "mean of nine"


@dataclass(frozen=True)
class Loss:
    """The lowest validation loss until `share` of the training's tokens, read at the evaluation nearest to it."""

    share: float = 1.0
    tokens: str = ""
    """What the share is at the published scale, where the name should say so."""

    @property
    def name(self) -> str:
        return f"best validation loss, {self.tokens}" if self.tokens else "best validation loss"


@dataclass(frozen=True)
class Accuracy:
    """The highest test accuracy of a classifier, in percent."""

    name: str = "best test accuracy, %"


@dataclass(frozen=True)
class StepTime:
    """Milliseconds of a training step, the median."""

    name: str = "ms a step"


@dataclass(frozen=True)
class TaskAccuracy:
    """Accuracy on a task of `mars evaluate`, in percent; normalised by length where the task has that.

    MEAN stands for the mean of the nine tasks.
    """

    task: str
    shots: int = 0

    @property
    def name(self) -> str:
        return f"{BY_NAME[self.task].label if self.task in BY_NAME else self.task}, {self.shots}-shot, %"


Quantity = Loss | Accuracy | StepTime | TaskAccuracy

BUDGETS = (Loss(0.1, "5B"), Loss(0.4, "20B"), Loss(1.0, "50B"))


def is_better(quantity: Quantity, a: float, b: float) -> bool:
    """Whether `a` is better than `b`."""
    return a > b if isinstance(quantity, Accuracy | TaskAccuracy) else a < b


@dataclass(frozen=True)
class Row:
    """A line of a table, or a curve: a recipe, or, with `recipe` empty, somebody else's model that is only quoted."""

    recipe: str
    published: Mapping[Quantity, float] = field(default_factory=dict)
    label: str = ""
    """By default the recipe's name without what all rows have in common."""


@dataclass(frozen=True)
class Ordering:
    """That the row `better` is better than the row `worse`; `gap` is the published difference, None where only words
    were published.
    """

    quantity: Quantity
    better: str
    worse: str
    gap: float | None


@dataclass(frozen=True)
class Exhibit:
    """A table or figure, or several that are views of the same runs.

    `where` says in which paper and under which number; `said` are orderings that the text states without figures
    (quantity, better recipe, worse recipe).
    """

    name: str
    where: str
    shows: str
    rows: tuple[Row, ...]
    quantities: tuple[Quantity, ...] = (Loss(),)
    said: tuple[tuple[Quantity, str, str], ...] = ()
    tasks: tuple[str, ...] = ()
    """Of `mars evaluate`, at the end of the runs."""
    note: str = ""
    draws_rates: bool = False
    """Whether the report groups runs by optimizer, so that it draws the loss against the rate, instead of by row."""

    @property
    def runs(self) -> tuple[Row, ...]:
        """Rows that are trained."""
        return tuple(row for row in self.rows if row.recipe)

    def label(self, row: Row) -> str:
        """What tables and figures call `row`."""
        if row.label:
            return row.label
        words = row.recipe.split("-")
        is_alone = len({_family(other.recipe) for other in self.runs}) == 1
        return "-".join(words[len(_family(row.recipe)) :] if is_alone else words[1:])

    def orderings(self) -> Iterator[Ordering]:
        """Every pair of rows of one model and data with different published figures, the better first; then what the
        text says.
        """
        labels = {row.recipe: self.label(row) for row in self.runs}
        for quantity in self.quantities:
            known = [row for row in self.runs if quantity in row.published]
            for a, b in combinations(known, 2):
                x, y = a.published[quantity], b.published[quantity]
                if x == y or _family(a.recipe) != _family(b.recipe):
                    continue
                better, worse = (a, b) if is_better(quantity, x, y) else (b, a)
                yield Ordering(quantity, labels[better.recipe], labels[worse.recipe], abs(x - y))
        for quantity, better, worse in self.said:
            yield Ordering(quantity, labels[better], labels[worse], None)


@dataclass(frozen=True)
class Unreproducible:
    """A table or figure that has nothing to measure."""

    name: str
    where: str
    reason: str


def _family(recipe: str) -> tuple[str, ...]:
    """The words of a recipe's name that say what it trains."""
    return tuple(recipe.split("-")[: 3 if recipe.startswith("gpt2") else 2])
