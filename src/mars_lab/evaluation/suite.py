"""The nine tasks of the papers: where the harness has them, what their files are called, what a row must have."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class SuiteTask:
    """A task of lm-evaluation-harness and its data.

    `folder` and `yaml` are where the harness defines it; `files` are names a part's file may have, first the official
    one; `evaluated` and `examples` are the parts that questions and few-shot examples come from.
    """

    name: str
    label: str
    folder: str
    yaml: str
    files: Mapping[str, tuple[str, ...]]
    evaluated: str
    keys: tuple[str, ...]
    examples: str = "train"
    as_on_hub: Callable[[Row], Row] = dict
    """From a row of the official file to one of the Hub, on which the harness's templates are written."""


def _stem_and_choices(stem: str) -> Callable[[Row], Row]:
    """ARC and OpenBookQA: the official files nest what the Hub has side by side; `stem` is the question's key there."""

    def convert(row: Row) -> Row:
        question = row.get("question")
        if not isinstance(question, dict):
            return row
        choices = {key: [choice[key] for choice in question["choices"]] for key in ("text", "label")}
        return {stem: question["stem"], "choices": choices, "answerKey": row["answerKey"]}

    return convert


def _boolq(row: Row) -> Row:
    label = row["answer"] if "answer" in row else row.get("label")  # BoolQ's own files, or SuperGLUE's
    return {**row, "label": int(label)} if label is not None else row


_ARC_KEYS = ("question", "choices", "answerKey")

NINE = (
    SuiteTask(
        "arc_easy",
        "ARC-E",
        "arc",
        "arc_easy.yaml",
        {"test": ("ARC-Easy-Test.jsonl",), "train": ("ARC-Easy-Train.jsonl",)},
        "test",
        _ARC_KEYS,
        as_on_hub=_stem_and_choices("question"),
    ),
    SuiteTask(
        "arc_challenge",
        "ARC-C",
        "arc",
        "arc_challenge.yaml",
        {"test": ("ARC-Challenge-Test.jsonl",), "train": ("ARC-Challenge-Train.jsonl",)},
        "test",
        _ARC_KEYS,
        as_on_hub=_stem_and_choices("question"),
    ),
    SuiteTask(
        "boolq",
        "BoolQ",
        "super_glue/boolq",
        "default.yaml",
        {"validation": ("dev.jsonl", "val.jsonl"), "train": ()},
        "validation",
        ("passage", "question", "label"),
        as_on_hub=_boolq,
    ),
    SuiteTask(
        "hellaswag",
        "HellaSwag",
        "hellaswag",
        "hellaswag.yaml",
        {"validation": ("hellaswag_val.jsonl",), "train": ("hellaswag_train.jsonl",)},
        "validation",
        ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    ),
    SuiteTask(
        "openbookqa",
        "OBQA",
        "openbookqa",
        "openbookqa.yaml",
        {"test": (), "train": ()},
        "test",
        ("question_stem", "choices", "answerKey"),
        as_on_hub=_stem_and_choices("question_stem"),
    ),
    SuiteTask(
        "piqa",
        "PIQA",
        "piqa",
        "piqa.yaml",
        {"validation": ("valid.jsonl",), "train": ()},
        "validation",
        ("goal", "sol1", "sol2", "label"),
    ),
    SuiteTask(
        "winogrande",
        "WinoGrande",
        "winogrande",
        "default.yaml",
        {"validation": ("dev.jsonl",), "train": ("train_xl.jsonl",)},
        "validation",
        ("sentence", "option1", "option2", "answer"),
    ),
    SuiteTask(
        "mmlu",
        "MMLU",
        "mmlu/default",
        "",
        {"test": (), "dev": ()},
        "test",
        ("question", "choices", "answer"),
        examples="dev",
    ),
    SuiteTask(
        "sciq",
        "SciQ",
        "sciq",
        "sciq.yaml",
        {"test": ("test.json",), "train": ("train.json",)},
        "test",
        ("question", "support", "distractor1", "distractor2", "distractor3", "correct_answer"),
    ),
)
BY_NAME = {task.name: task for task in NINE}
