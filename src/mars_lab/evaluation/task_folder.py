"""Local questions as a folder of tasks of lm-evaluation-harness, which can also be given to its own command.

A task is a YAML file (JSON is YAML, too) and a file of rows for each part. Those of the nine tasks include the
harness's own definition and replace the data.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mars_lab.errors import InputError
from mars_lab.evaluation import task_files
from mars_lab.evaluation.suite import BY_NAME, Row, SuiteTask

LAST_WORD, CONTINUATION = "last_word", "continuation"

_METRICS: dict[str, dict[str, Any]] = {
    "acc": {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    "acc_norm": {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
    "perplexity": {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
}
_BOOK_TASKS: dict[str, dict[str, Any]] = {
    LAST_WORD: {
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{' ' + word}}",
        "target_delimiter": "",
        "metric_list": [_METRICS["acc"], _METRICS["perplexity"]],
    },
    CONTINUATION: {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [_METRICS["acc"], _METRICS["acc_norm"]],
    },
}


class TaskFolder:
    """Writes tasks to `path`, an empty folder; `harness` is the folder of the harness's own tasks."""

    def __init__(self, path: Path, harness: Path) -> None:
        self.path, self._harness = path, harness

    def add_book_task(self, name: str, rows: Sequence[Row]) -> None:
        """Make `rows` the task `last_word` or `continuation`."""
        config = {**_BOOK_TASKS[name], "test_split": "test", "metadata": {"version": 1.0}}
        self._write(name, config, {"test": rows})

    def add_suite_task(self, task: SuiteTask, data: Path, *, num_shots: int) -> None:
        """Make the files in `data` the task `task`, with examples for up to `num_shots` before a question.

        Raises:
            InputError: a part is missing, damaged or too small.
        """
        parts = [task.evaluated, task.examples] if num_shots else [task.evaluated]
        if task.name == "mmlu":
            self._add_mmlu({part: task_files.read_mmlu(data, part) for part in parts}, num_shots)
            return
        rows = {part: task_files.read(task, data, part) for part in parts}
        splits: dict[str, str | None] = {f"{key}_split": None for key in ("training", "validation", "test")}
        splits["test_split" if task.evaluated == "test" else "validation_split"] = task.evaluated
        if num_shots:
            if len(rows[task.examples]) <= num_shots:  # the harness draws one more, in case one is the question itself
                count = len(rows[task.examples])
                raise InputError(f"{data} has {count} examples ({task.examples}), {num_shots}-shot needs more")
            splits["training_split"] = task.examples
        self._write(task.name, {"include": str(self._harness / task.folder / task.yaml), **splits}, rows)

    def _add_mmlu(self, parts: Mapping[str, Mapping[str, Sequence[Row]]], num_shots: int) -> None:
        subjects = parts["test"]
        for subject, rows in subjects.items():
            definition = self._harness / BY_NAME["mmlu"].folder / f"mmlu_{subject}.yaml"
            if not definition.is_file():
                raise InputError(f"MMLU has no subject {subject!r}; remove its file")
            own = {"test": rows}
            if (examples := parts.get("dev")) is not None:
                if (count := len(examples.get(subject, ()))) < num_shots:
                    raise InputError(f"MMLU's {subject} has {count} examples (dev); {num_shots}-shot needs as many")
                own["dev"] = examples[subject]
            splits = {"test_split": "test", "fewshot_split": "dev" if "dev" in own else None}
            self._write(f"mmlu_{subject}", {"include": str(definition), **splits}, own)
        mean = {"metric": "acc", "weight_by_size": True}
        group = {"group": "mmlu", "task": [f"mmlu_{subject}" for subject in subjects], "aggregate_metric_list": [mean]}
        self._write_config("mmlu", {**group, "metadata": {"version": 2}})

    def _write(self, name: str, config: dict[str, Any], parts: Mapping[str, Sequence[Row]]) -> None:
        files = {part: self.path / f"{name}-{part}.jsonl" for part in parts}
        for part, file in files.items():
            file.write_text("".join(json.dumps(row) + "\n" for row in parts[part]), encoding="utf-8")
        data = {"data_files": {part: str(file) for part, file in files.items()}, "cache_dir": str(self.path / "cache")}
        dataset = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": data}
        self._write_config(name, {"task": name, **config, **dataset})

    def _write_config(self, name: str, config: dict[str, Any]) -> None:
        (self.path / f"{name}.yaml").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
