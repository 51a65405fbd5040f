"""What an image classifier gets right: loss and accuracy on its test images, by class, and what is taken for what."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mars_lab.evaluation.results import markdown
from mars_lab.evaluation.trained import Classifier
from mars_lab.report import published
from mars_lab.report.published import Published
from mars_lab.tasks.vision import by_class
from mars_lab.training.config import RunConfig

_WIDEST_TABLE = 20
"""Classes; a confusion matrix of more is in the JSON file alone."""


@dataclass(frozen=True)
class ImageResults:
    """What an evaluation found. `confusion` counts test images: rows are their classes, columns the model's answers."""

    checkpoint: str
    dataset: str
    classes: Sequence[str]
    loss: float
    confusion: Sequence[Sequence[int]]
    published: Published | None

    @property
    def num_images(self) -> int:
        """That were judged."""
        return sum(map(sum, self.confusion))

    @property
    def accuracy(self) -> float:
        """Of all images."""
        return sum(row[index] for index, row in enumerate(self.confusion)) / self.num_images

    def values(self) -> dict[str, Any]:
        """As plain values."""
        accuracies = {name: accuracy for name, accuracy, _ in by_class(self.classes, self.confusion)}
        measures = {"num_images": self.num_images, "accuracy": self.accuracy, "accuracy_by_class": accuracies}
        return {**asdict(self), **measures}

    def tables(self) -> str:
        """Markdown: beside the published figure, if it is of such a run; by class; the confusion matrix."""
        rows = [(self.checkpoint, f"{self.num_images:,}", f"{self.loss:.4f}", f"{self.accuracy:.2%}")]
        if (figure := self.published) is not None:
            rows.append((f"published: {figure.where}", "10,000", f"{figure.loss:g}", f"{figure.accuracy:g}%"))
        parts = [markdown([("", "test images", "loss, nats", "accuracy"), *rows])]
        classes = [(name, f"{acc:.2%}", other) for name, acc, other in by_class(self.classes, self.confusion)]
        parts.append(markdown([("class", "accuracy", "most often taken for"), *classes]))
        if len(self.classes) <= _WIDEST_TABLE:
            counts = zip(self.classes, self.confusion, strict=True)
            matrix = [(name, *map(str, row)) for name, row in counts]
            parts.append(markdown([("is \\ taken for", *self.classes), *matrix]))
        return "\n\n".join(parts)

    def write(self, folder: Path) -> None:
        """Write `results.json` and `results.md`."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in (("results.json", json.dumps(self.values(), indent=1)), ("results.md", self.tables())):
            partial = folder / f".{name}.partial"
            partial.write_text(text + "\n")
            partial.replace(folder / name)


def judge(classifier: Classifier, device: str) -> ImageResults:
    """Ask `classifier` for the class of each test image of its task."""
    task, run = classifier.task, classifier.run
    loss, counts = task.judged(classifier.model.to(device), device)
    return ImageResults(
        f"{run.path.name} {classifier.checkpoint.name}",
        task.config.data.dataset,
        task.class_names,
        loss,
        counts.tolist(),
        _published(run.config(), int(classifier.checkpoint.name.removeprefix("step-"))),
    )


def _published(config: RunConfig, step: int) -> Published | None:
    values: Mapping[str, Any] = asdict(config)
    optimizer, train = config.optimizer, config.train
    name = optimizer.label or optimizer.name + ("-exact" if optimizer.mode == "exact" else "")
    return published.published(values, name, step * train.batch_size * train.num_accumulation_steps)
