"""Rows of the nine tasks from local files: as their authors distribute them, or as the Hub has them."""

import csv
import json
from collections.abc import Iterable
from pathlib import Path

from mars_lab.errors import InputError
from mars_lab.evaluation.suite import BY_NAME, Row, SuiteTask

_SUFFIXES = (".jsonl", ".json", ".parquet")


def read(task: SuiteTask, folder: Path, part: str) -> list[Row]:
    """The rows of a part (`test`, `validation`, `train`), as the Hub has them.

    Raises:
        InputError: there is no file of it in `folder`, or a row lacks a key.
    """
    path = find(task, folder, part)
    if path is None:
        names = ", ".join([*task.files.get(part, ()), *(f"{part}{suffix}" for suffix in _SUFFIXES)])
        raise InputError(
            f"{folder} holds nothing for the part {part!r} of {task.name}; put one of these there: {names}"
        )
    return list(_checked(task, path, _labelled(task, path, _rows(path))))


def find(task: SuiteTask, folder: Path, part: str) -> Path | None:
    """The file of a part: by its official name, by the part's, or as downloaded from the Hub (`test-00000-of-...`)."""
    names = [*task.files.get(part, ()), *(f"{part}{suffix}" for suffix in _SUFFIXES)]
    found = [folder / name for name in names if (folder / name).is_file()]
    return next(iter([*found, *sorted(folder.glob(f"{part}-00000-of-00001.parquet"))]), None)


def read_mmlu(folder: Path, part: str) -> dict[str, list[Row]]:
    """MMLU's rows by subject, from the authors' `test/<subject>_test.csv`, or from `<subject>/test.jsonl`, ....

    Raises:
        InputError: there is no such file, or a row isn't a question, four choices and a letter.
    """
    found = {
        path.name.removesuffix(f"_{part}.csv"): [_mmlu_row(path, number, row) for number, row in _csv(path)]
        for path in sorted((folder / part).glob(f"*_{part}.csv"))
    }
    task = BY_NAME["mmlu"]
    for subject in sorted(path for path in folder.glob("*") if path.is_dir() and find(task, path, part) is not None):
        found[subject.name] = read(task, subject, part)
    if not found:
        raise InputError(
            f"{folder} holds no {part}/<subject>_{part}.csv and no <subject>/{part}.jsonl or .parquet of MMLU"
        )
    return found


def _csv(path: Path) -> Iterable[tuple[int, list[str]]]:
    with path.open(encoding="utf-8", newline="") as stream:
        yield from enumerate(csv.reader(stream), start=1)


def _mmlu_row(path: Path, number: int, row: list[str]) -> Row:
    if len(row) != 6 or row[5] not in "ABCD":
        raise InputError(f"{path}, row {number}: needs a question, four choices and a letter A to D, got {row}")
    return {"question": row[0], "choices": row[1:5], "answer": "ABCD".index(row[5])}


def _rows(path: Path) -> list[Row]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    text = path.read_text(encoding="utf-8-sig")
    try:
        if path.suffix == ".json" and text.lstrip().startswith("["):
            return json.loads(text)
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise InputError(f"{path} holds no valid JSON ({error}); restore it") from None


def _labelled(task: SuiteTask, path: Path, rows: list[Row]) -> list[Row]:
    """PIQA's authors keep the answers in a file of their own, `valid-labels.lst`."""
    labels = path.with_name(f"{path.stem}-labels.lst")
    if task.name != "piqa" or not rows or "label" in rows[0] or not labels.is_file():
        return rows
    answers = labels.read_text().split()
    if len(answers) != len(rows):
        raise InputError(f"{labels} has {len(answers)} answers to the {len(rows)} questions of {path}; restore them")
    return [{**row, "label": int(answer)} for row, answer in zip(rows, answers, strict=True)]


def _checked(task: SuiteTask, path: Path, rows: list[Row]) -> Iterable[Row]:
    if not rows:
        raise InputError(f"{path} has no rows; restore it")
    for number, row in enumerate(rows, start=1):
        try:
            converted = task.as_on_hub(row)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}, row {number}: not as {task.name} has it ({error!r}): {row}") from None
        if missing := [key for key in task.keys if key not in converted]:
            raise InputError(f"{path}, row {number}: has no {missing[0]!r}, only {', '.join(row)}")
        yield {key: converted[key] for key in task.keys}
