"""Questions: from the files of the tasks' authors and of the Hub, and from books."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from mars_lab.errors import InputError
from mars_lab.evaluation import book_tasks, task_files
from mars_lab.evaluation.suite import BY_NAME
from mars_lab.evaluation.task_folder import TaskFolder

CHOICES = {"text": ["sun", "moon"], "label": ["A", "B"]}
ON_HUB: dict[str, dict[str, Any]] = {
    "arc_easy": {"question": "What shines?", "choices": CHOICES, "answerKey": "A"},
    "openbookqa": {"question_stem": "What shines?", "choices": CHOICES, "answerKey": "A"},
    "boolq": {"passage": "It shines.", "question": "does it shine", "label": 1},
    "piqa": {"goal": "shine", "sol1": "rub", "sol2": "hide", "label": 0},
}
STEM = {"stem": "What shines?", "choices": [{"text": "sun", "label": "A"}, {"text": "moon", "label": "B"}]}
OFFICIAL: list[tuple[str, str, dict[str, Any]]] = [
    ("arc_easy", "ARC-Easy-Test.jsonl", {"id": "1", "question": STEM, "answerKey": "A"}),
    ("openbookqa", "test.jsonl", {"id": "1", "question": STEM, "answerKey": "A"}),
    ("boolq", "dev.jsonl", {"question": "does it shine", "title": "Sun", "answer": True, "passage": "It shines."}),
    ("boolq", "val.jsonl", {"question": "does it shine", "passage": "It shines.", "idx": 0, "label": True}),
    ("piqa", "valid.jsonl", {"goal": "shine", "sol1": "rub", "sol2": "hide"}),
]


@pytest.mark.parametrize(("name", "file", "row"), OFFICIAL)
def test_official_rows_become_the_hubs(name: str, file: str, row: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / file).write_text(json.dumps(row) + "\n\n")
    (tmp_path / "valid-labels.lst").write_text("0\n")
    assert task_files.read(BY_NAME[name], tmp_path, BY_NAME[name].evaluated) == [ON_HUB[name]]


@pytest.mark.parametrize("name", ON_HUB)
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet", "-00000-of-00001.parquet"])
def test_rows_of_the_hub_are_read_as_they_are(name: str, ending: str, tmp_path: Path) -> None:
    part = BY_NAME[name].evaluated
    rows = [{**ON_HUB[name], "idx": 7}]
    if ending.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{part}{ending}")
    else:
        (tmp_path / f"{part}{ending}").write_text(json.dumps(rows) if ending == ".json" else json.dumps(rows[0]))
    assert task_files.read(BY_NAME[name], tmp_path, part) == [ON_HUB[name]]


def test_damaged_files_are_named(tmp_path: Path) -> None:
    def fails(name: str, file: str, text: str, message: str) -> None:
        (tmp_path / file).write_text(text)
        with pytest.raises(InputError, match=message):
            task_files.read(BY_NAME[name], tmp_path, BY_NAME[name].evaluated)

    fails("sciq", "test.json", "[{]", r"test.json holds no valid JSON")
    fails("sciq", "test.json", "[]", r"test.json has no rows")
    fails("sciq", "test.json", '[{"question": "?"}]', r"row 1: has no 'support', only question")
    fails("arc_easy", "ARC-Easy-Test.jsonl", '{"question": {"stem": "?"}}', r"row 1: not as arc_easy has it \(KeyError")
    fails("winogrande", "dev.jsonl", "\n", r"dev.jsonl has no rows")
    (tmp_path / "valid-labels.lst").write_text("0\n1\n")
    row = json.dumps({"goal": "", "sol1": "", "sol2": ""})
    fails("piqa", "valid.jsonl", row, r"valid-labels.lst has 2 answers to the 1 questions")
    (tmp_path / "valid-labels.lst").unlink()
    fails("piqa", "valid.jsonl", row, r"row 1: has no 'label'")


def test_mmlu_by_subject(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "anatomy_test.csv").write_text('"Where, then?",a,b,c,"d, e",D\n')
    expected = {"question": "Where, then?", "choices": ["a", "b", "c", "d, e"], "answer": 3}
    assert task_files.read_mmlu(tmp_path, "test") == {"anatomy": [expected]}
    (tmp_path / "hub" / "anatomy").mkdir(parents=True)
    (tmp_path / "hub" / "anatomy" / "test.jsonl").write_text(json.dumps({**expected, "subject": "anatomy"}))
    assert task_files.read_mmlu(tmp_path / "hub", "test") == {"anatomy": [expected]}
    with pytest.raises(InputError, match=r"holds no dev/<subject>_dev.csv"):
        task_files.read_mmlu(tmp_path, "dev")
    (tmp_path / "test" / "anatomy_test.csv").write_text("Where?,a,b,c,d,E\n")
    with pytest.raises(InputError, match=r"anatomy_test.csv, row 1: needs a question, four choices and a letter"):
        task_files.read_mmlu(tmp_path, "test")


def test_mmlu_subjects_must_be_known_and_have_examples(tmp_path: Path) -> None:
    (tmp_path / "harness" / "mmlu" / "default").mkdir(parents=True)
    (tmp_path / "harness" / "mmlu" / "default" / "mmlu_anatomy.yaml").touch()
    (tmp_path / "tasks").mkdir()
    for part, subjects in (("test", ("anatomy",)), ("dev", ("virology",))):
        (tmp_path / "data" / part).mkdir(parents=True)
        for subject in subjects:
            (tmp_path / "data" / part / f"{subject}_{part}.csv").write_text("Where?,a,b,c,d,A\n")
    folder = TaskFolder(tmp_path / "tasks", tmp_path / "harness")
    with pytest.raises(InputError, match=r"anatomy has 0 examples \(dev\); 1-shot needs as many"):
        folder.add_suite_task(BY_NAME["mmlu"], tmp_path / "data", num_shots=1)
    (tmp_path / "data" / "test" / "alchemy_test.csv").write_text("Where?,a,b,c,d,A\n")
    with pytest.raises(InputError, match=r"MMLU has no subject 'alchemy'"):
        folder.add_suite_task(BY_NAME["mmlu"], tmp_path / "data", num_shots=0)


def sentence(first: str, *middle: str, last: str) -> str:
    return " ".join([first, *middle, last]) + "."


OPENING = [sentence("There", *["was"] * 18, last=f"harbour{i}") for i in range(3)]  # 60 words
PARAGRAPH = " ".join([*OPENING, "So they all went down to it again.", "Nobody had ever seen such a harbour."])


def test_a_last_word_has_occurred_before() -> None:
    """The third sentence ends with no word of letters, the fourth with a new one, the fifth with one of the first."""
    text = PARAGRAPH.replace("harbour0", "harbour")
    rows = book_tasks.last_words([f"Short paragraph.\n\n{text}\n\n{PARAGRAPH}"], 10)
    assert rows == [{"context": text.removesuffix(" harbour."), "word": "harbour"}]


def test_a_continuation_is_the_next_sentence_among_those_of_the_same_book() -> None:
    endings = [f"So they all went down to harbour number {i}." for i in range(5)]
    books = ["\n\n".join(" ".join([*OPENING, ending, "And so on."]) for ending in endings), PARAGRAPH]
    rows = book_tasks.continuations(books, 10)
    assert len(rows) == 5, "the second book has too few passages to choose from"
    for row, ending in zip(rows, endings, strict=True):
        assert row["context"] == " ".join(OPENING)
        assert row["choices"][row["label"]] == ending
        assert len(set(row["choices"])) == 4
        assert set(row["choices"]) <= set(endings)
    assert rows == book_tasks.continuations(books, 10)
    some = book_tasks.continuations(books, 3)
    assert len(some) == 3
    assert all(row in rows for row in some)


def test_folders_of_books_leave_training_text_out(tmp_path: Path) -> None:
    for name in ("train-0", "val", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    assert list(book_tasks.held_out_books(tmp_path)) == ["test", "val"]
    assert list(book_tasks.held_out_books(tmp_path / "train-0.jsonl")) == ["train-0"]
