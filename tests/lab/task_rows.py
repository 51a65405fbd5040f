"""Small questions in the formats in which the authors of the nine tasks distribute them, and what a model is asked."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .tiny_runs import prose

Row = dict[str, Any]
Asked = tuple[list[tuple[str, str]], int, list[int]]
"""Of each choice the text before and the text scored; the right one; the lengths that acc_norm divides by."""


def words(count: int, seed: int) -> str:
    return prose(count, seed).strip()


def _letters(row: int, seed: int) -> Row:
    choices = [{"text": words(1 + (row + i) % 4, 10 * row + i + seed), "label": "ABCD"[i]} for i in range(4)]
    stem = {"stem": words(6, row + seed), "choices": choices}
    return {"id": f"q{row}", "question": stem, "answerKey": "ABCD"[(3 * row + seed) % 4]}


ROWS: dict[str, Callable[[int, int], Row]] = {
    "arc_easy": _letters,
    "arc_challenge": lambda row, seed: _letters(row, seed + 500),
    "boolq": lambda row, seed: {
        "question": words(4, row + seed),
        "title": "Union",
        "answer": bool((row + seed) % 2),
        "passage": words(9, row + seed + 7),
    },
    "hellaswag": lambda row, seed: {
        "ind": row,
        "activity_label": "Taxes",
        "ctx_a": words(5, row + seed) + ".",
        "ctx_b": words(2, row + seed + 3),
        "ctx": "unused",
        "endings": [words(2 + i, 10 * row + i + seed) + " [step] ." for i in range(4)],
        "label": (row + seed) % 4,
    },
    "openbookqa": lambda row, seed: _letters(row, seed + 900),
    "piqa": lambda row, seed: {
        "goal": words(5, row + seed),
        "sol1": words(3, row + seed + 1),
        "sol2": words(6, row + seed + 2),
    },
    "winogrande": lambda row, seed: {
        "qID": f"w{row}",
        "sentence": f"{words(4, row + seed)} _ {words(4, row + seed + 1)}.",
        "option1": words(1, row + seed + 2),
        "option2": words(2, row + seed + 3),
        "answer": "12"[(row + seed) % 2],
    },
    "sciq": lambda row, seed: {
        "question": words(5, row + seed),
        "distractor1": words(1, 7 * row + seed + 1),
        "distractor2": words(2, 7 * row + seed + 2),
        "distractor3": words(3, 7 * row + seed + 3),
        "correct_answer": words(2, 7 * row + seed + 4),
        "support": words(8, row + seed + 5),
    },
}
OFFICIAL = {
    "arc_easy": ("ARC-Easy-Test.jsonl", "ARC-Easy-Train.jsonl"),
    "arc_challenge": ("ARC-Challenge-Test.jsonl", "ARC-Challenge-Train.jsonl"),
    "boolq": ("dev.jsonl", "train.jsonl"),
    "hellaswag": ("hellaswag_val.jsonl", "hellaswag_train.jsonl"),
    "openbookqa": ("test.jsonl", "train.jsonl"),
    "piqa": ("valid.jsonl", "train.jsonl"),
    "winogrande": ("dev.jsonl", "train_xl.jsonl"),
    "sciq": ("test.json", "train.json"),
}
MMLU_SUBJECTS = {"anatomy": 5, "virology": 3}


def piqa_label(row: int, seed: int) -> int:
    return (row + seed) // 2 % 2


def mmlu_row(row: int, seed: int) -> list[str]:
    return [words(6, row + seed), *(words(1 + i, 5 * row + i + seed) for i in range(4)), "ABCD"[(row + seed) % 4]]


def write_official(folder: Path, num_rows: int) -> None:
    """All nine tasks; examples for 5-shot, all the same, so that it doesn't matter which come and in which order."""
    for name, make in ROWS.items():
        (folder / name).mkdir(parents=True)
        parts = ([(row, 0) for row in range(num_rows)], [(1, 300)] * 6)
        for file, part in zip(OFFICIAL[name], parts, strict=True):
            rows = [make(*where) for where in part]
            text = json.dumps(rows) if file.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
            (folder / name / file).write_text(text)
            if name == "piqa":
                labels = "".join(f"{piqa_label(*where)}\n" for where in part)
                (folder / name / f"{file.removesuffix('.jsonl')}-labels.lst").write_text(labels)
    for part in ("test", "dev"):
        (folder / "mmlu" / part).mkdir(parents=True)
    for subject, count in MMLU_SUBJECTS.items():
        for part, rows in (("test", [(row, count) for row in range(count)]), ("dev", [(1, 300)] * 5)):
            with (folder / "mmlu" / part / f"{subject}_{part}.csv").open("w", newline="") as stream:
                csv.writer(stream).writerows(mmlu_row(*where) for where in rows)


def asked(name: str, row: int, seed: int) -> Asked:
    """What the model is asked, written down from the harness's templates, by hand."""
    question = ROWS[name](row, seed)
    match name:
        case "arc_easy" | "arc_challenge" | "openbookqa":
            stem = question["question"]["stem"]
            before = stem if name == "openbookqa" else f"Question: {stem}\nAnswer:"
            choices = [choice["text"] for choice in question["question"]["choices"]]
            right = "ABCD".index(question["answerKey"])
        case "boolq":
            before, choices = f"{question['passage']}\nQuestion: {question['question']}?\nAnswer:", ["no", "yes"]
            right = int(question["answer"])
        case "hellaswag":
            before = f"Taxes: {question['ctx_a']} {question['ctx_b'].capitalize()}"
            choices = [ending.replace("[step] ", "").replace("  ", " ") for ending in question["endings"]]
            right = question["label"]
        case "piqa":
            before, choices = f"Question: {question['goal']}\nAnswer:", [question["sol1"], question["sol2"]]
            right = piqa_label(row, seed)
        case "sciq":
            before = f"{question['support']}\nQuestion: {question['question']}\nAnswer:"
            choices = [question[key] for key in ("distractor1", "distractor2", "distractor3", "correct_answer")]
            right = 3
        case _:
            left, rest = question["sentence"].split("_")
            befores = [left + question[f"option{i}"] for i in (1, 2)]
            return [(before, rest) for before in befores], int(question["answer"]) - 1, [1, 1]
    return [(before, " " + choice) for choice in choices], right, [len(choice) for choice in choices]


def asked_mmlu(subject: str, row: int, *, num_shots: int) -> Asked:
    text = f"The following are multiple choice questions (with answers) about {subject}.\n\n"

    def spelled(fields: list[str]) -> str:
        choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", fields[1:5], strict=True))
        return f"{fields[0]}\n{choices}\nAnswer:"

    example = mmlu_row(1, 300)
    text += f"{spelled(example)} {example[5]}\n\n" * num_shots
    fields = mmlu_row(row, MMLU_SUBJECTS[subject])
    return [(text + spelled(fields), f" {letter}") for letter in "ABCD"], "ABCD".index(fields[5]), [1] * 4


def example_text(name: str) -> str:
    """The few-shot example with its answer."""
    scored, right, _ = asked(name, 1, 300)
    return "".join(scored[right]) + "\n\n"
