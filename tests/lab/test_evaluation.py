"""`mars evaluate` against values computed from the model's logits and prompts written by hand."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM

from mars_lab.cli import main
from mars_lab.data.tokenizer import Tokenizer
from mars_lab.errors import InputError
from mars_lab.evaluation import book_tasks, harness, hf_folder
from mars_lab.evaluation.results import Results
from mars_lab.evaluation.suite import NINE
from mars_lab.models.gpt2 import GPT2, GPT2Config
from mars_lab.tasks.language import LanguageTask
from mars_lab.training.config import RunConfig

from .task_rows import MMLU_SUBJECTS, ROWS, Asked, asked, asked_mmlu, example_text, words, write_official
from .tiny_runs import flags

NUM_ROWS = 8


@pytest.fixture(scope="module")
def tokenizer(tiny: RunConfig) -> Tokenizer:
    return LanguageTask(tiny.language, 0).data.tokenizer


@pytest.fixture(scope="module")
def model() -> GPT2:
    torch.manual_seed(1)
    model = GPT2(GPT2Config(num_layers=2, num_heads=2, width=16, context_length=1024, vocab_size=300)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def folder(model: GPT2, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "hf"
    hf_folder.write(path, model, tokenizer)
    return path


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("official")
    write_official(path, NUM_ROWS)
    return path


class ByHand:
    """Log-probabilities straight from the logits."""

    def __init__(self, model: GPT2, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer

    @torch.no_grad()
    def score(self, before: str, text: str) -> tuple[float, bool]:
        """The log-probability of `text` after `before`, and whether each of its tokens is the likeliest."""
        ids, first = self.tokenizer.encode(before + text), len(self.tokenizer.encode(before))
        logs = self.model(torch.tensor([ids]))[0].log_softmax(-1)
        total = sum(logs[i - 1, ids[i]].item() for i in range(first, len(ids)))
        return total, all(logs[i - 1].argmax() == ids[i] for i in range(first, len(ids)))

    def is_right(self, question: Asked, prefix: str = "", *, normalised: bool = False) -> bool:
        scored, right, lengths = question
        logs = [self.score(prefix + before, text)[0] for before, text in scored]
        values = [log / length for log, length in zip(logs, lengths, strict=True)] if normalised else logs
        return max(range(len(values)), key=values.__getitem__) == right


@pytest.fixture(scope="module")
def by_hand(model: GPT2, tokenizer: Tokenizer) -> ByHand:
    return ByHand(model, tokenizer)


def evaluated(*args: str | Path, output: Path) -> dict[str, Any]:
    main(["evaluate", *map(str, args), "--output", str(output), "--device", "cpu"])
    return json.loads((output / "results.json").read_text())


@pytest.fixture(scope="module")
def nine(folder: Path, official: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("nine")
    return {"output": output, **evaluated(folder, "--data", official, "--shots", "0", "5", output=output)}


@pytest.mark.parametrize("num_shots", [0, 5])
@pytest.mark.parametrize("name", ROWS)
def test_accuracies_are_those_of_the_logits(name: str, num_shots: int, nine: dict[str, Any], by_hand: ByHand) -> None:
    found = nine["shots"][str(num_shots)][name]
    prefix = example_text(name) * num_shots
    questions = [asked(name, row, 0) for row in range(NUM_ROWS)]
    right = [by_hand.is_right(question, prefix) for question in questions]
    assert found["acc"] == pytest.approx(sum(right) / NUM_ROWS)
    assert found["num_questions"] == NUM_ROWS
    if name not in ("boolq", "winogrande"):
        normalised = [by_hand.is_right(question, prefix, normalised=True) for question in questions]
        assert found["acc_norm"] == pytest.approx(sum(normalised) / NUM_ROWS)
    else:
        assert "acc_norm" not in found


@pytest.mark.parametrize("num_shots", [0, 5])
def test_mmlu_is_the_mean_over_all_questions(num_shots: int, nine: dict[str, Any], by_hand: ByHand) -> None:
    found = nine["shots"][str(num_shots)]["mmlu"]
    questions = [
        asked_mmlu(subject, row, num_shots=num_shots)
        for subject, count in MMLU_SUBJECTS.items()
        for row in range(count)
    ]
    assert found["acc"] == pytest.approx(sum(map(by_hand.is_right, questions)) / len(questions))
    assert found["num_questions"] == len(questions)


def test_the_questions_tell_right_from_wrong(nine: dict[str, Any]) -> None:
    """Otherwise the comparisons above would compare zeros."""
    accuracies = {metrics["acc"] for metrics in nine["shots"]["0"].values()}
    assert len(accuracies) > 2


def test_the_table_stands_beside_the_published_rows(nine: dict[str, Any]) -> None:
    table = (nine["output"] / "results.md").read_text().splitlines()
    assert table[0].split("|")[2:5] == [" ARC-E ", " ARC-C ", " BoolQ "]
    zero = nine["shots"]["0"]
    shown = [100 * zero[task.name].get("acc_norm", zero[task.name]["acc"]) for task in NINE]
    assert table[2] == f"| hf, 0-shot | {' | '.join(f'{value:.2f}' for value in [*shown, sum(shown) / 9])} |"
    assert "hf, 5-shot" in table[3]
    # The means of the authors' own table.
    assert [line.split("|")[-2].strip() for line in table[4:7]] == ["41.19", "45.72", "45.93"]


def book(num_paragraphs: int) -> str:
    """Paragraphs of twelve sentences of seven words."""
    paragraphs = [" ".join(words(7, 31 * p + s).capitalize() + "." for s in range(12)) for p in range(num_paragraphs)]
    return "Title\n\n" + "\n\n".join(paragraphs)


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("books") / "test.jsonl"
    path.write_text(json.dumps({"text": book(9)}) + "\n" + json.dumps({"text": book(5)}) + "\n")
    return path


def test_questions_from_books_are_scored_as_by_hand(
    folder: Path, books: Path, by_hand: ByHand, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluated(folder, "--tasks", "books", "--books", books, "--num-passages", "10", output=tmp_path)["shots"]
    texts = list(book_tasks.held_out_books(books))
    scores = [by_hand.score(row["context"], " " + row["word"]) for row in book_tasks.last_words(texts, 10)]
    last_word = found["0"]["last_word"]
    assert last_word["perplexity"] == pytest.approx(math.exp(-sum(log for log, _ in scores) / len(scores)), rel=1e-4)
    assert last_word["acc"] == sum(is_greedy for _, is_greedy in scores) / len(scores)
    rows = book_tasks.continuations(texts, 10)
    questions: list[Asked] = [
        ([(row["context"], " " + choice) for choice in row["choices"]], row["label"], [len(c) for c in row["choices"]])
        for row in rows
    ]
    continuation = found["0"]["continuation"]
    assert continuation["acc"] == sum(map(by_hand.is_right, questions)) / len(rows)
    assert continuation["acc_norm"] == sum(by_hand.is_right(q, normalised=True) for q in questions) / len(rows)
    assert "| last_word | 0 | 10 |" in capsys.readouterr().out


def test_a_run_is_evaluated_by_name_and_results_grow(
    tmp_path: Path, tiny: RunConfig, official: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = ("--runs", str(tmp_path))
    main(["train", *flags(tiny), "--name", "first", *runs])
    common = ["evaluate", "first", "--data", str(official), "--limit", "3", "--device", "cpu", *runs]
    main([*common, "--tasks", "piqa"])
    main([*common, "--tasks", "winogrande"])
    folder = tmp_path / "first" / "evaluation" / "step-00000012-limit-3"
    results = json.loads((folder / "results.json").read_text())
    assert {name: values["num_questions"] for name, values in results["shots"]["0"].items()} == {
        "piqa": 3,
        "winogrande": 3,
    }
    assert "| first step-00000012, 0-shot | – | – |" in capsys.readouterr().out
    other = [*common, "--tasks", "piqa", "--limit", "4", "--output", str(folder)]
    assert_fails(other, "holds results of another limit (3, now 4)", capsys)


def test_an_answer_longer_than_the_context_is_said(
    tmp_path: Path, tiny: RunConfig, books: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["train", *flags(tiny), "--name", "short", "--runs", str(tmp_path)])
    asked = ["evaluate", "short", "--runs", str(tmp_path), "--tasks", "books", "--books", str(books), "--device", "cpu"]
    assert_fails(asked, "has an answer that is longer than the 16 tokens", capsys)


def assert_fails(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


KILLED = """
import os, signal, sys, time
from lm_eval.models.huggingface import HFLM
from mars_lab.cli import main
call, calls = HFLM._model_call, []

def killed(self, *args, **kwargs):
    calls.append(args)
    if len(calls) == 4:
        time.sleep(2)  # answers reach the disk in a thread
        os.kill(os.getpid(), signal.SIGKILL)
    return call(self, *args, **kwargs)

HFLM._model_call = killed
main(sys.argv[1:])
"""


def test_killed_it_continues_where_it_was(
    folder: Path, books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapped: Any = HFLM
    call, calls = wrapped._model_call, []
    monkeypatch.setattr(wrapped, "_model_call", lambda self, *a, **k: (calls.append(1), call(self, *a, **k))[1])
    args = [str(folder), "--tasks", "last_word", "--books", str(books), "--batch-size", "1", "--num-passages", "10"]
    whole = evaluated(*args, output=tmp_path / "whole")
    num_calls = len(calls)
    command = [sys.executable, "-c", KILLED, "evaluate", *args, "--output", str(tmp_path / "killed"), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert killed.returncode == -9, killed.stderr
    assert not (tmp_path / "killed" / "results.json").exists()

    calls.clear()
    assert evaluated(*args, output=tmp_path / "killed") == whole
    assert len(calls) == num_calls - 3 > 0


def test_interrupted_it_says_how_to_continue(
    folder: Path, books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(HFLM, "_model_call", interrupted)
    with pytest.raises(SystemExit) as stopped:
        evaluated(folder, "--tasks", "last_word", "--books", books, output=tmp_path)
    assert stopped.value.code == 130
    assert "The same command again continues." in capsys.readouterr().err


def test_what_is_missing_is_named(
    folder: Path, official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: str, message: str) -> None:
        assert_fails(["evaluate", str(folder), "--output", str(tmp_path / "out"), *args], message, capsys)

    fails("--tasks", "books", message="made from held-out books; give their file or folder with --books")
    fails("--limit", "0", message="--limit must be at least 1, got 0")
    fails("--shots", "-1", message="none below 0")
    fails(
        "--data", str(tmp_path), message="holds nothing for the part 'test' of arc_easy; put one of these there: ARC-E"
    )
    fails("--data", str(official), "--shots", "6", message="arc_easy has 6 examples (train), 6-shot needs more")
    (tmp_path / "train.jsonl").write_text('{"text": "seen"}\n')
    fails("--tasks", "books", "--books", str(tmp_path), message="a model has seen those; give held-out books")
    fails("--tasks", "books", "--books", str(tmp_path / "train.jsonl"), message="hold no passage for a continuation")

    def offline(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no network")

    with monkeypatch.context() as patch:
        patch.setattr("datasets.load_dataset", offline)
        fails(
            "--tasks",
            "piqa",
            message="questions of piqa can't be loaded (ConnectionError: no network); where there is no",
        )
    find_spec = harness.importlib.util.find_spec
    monkeypatch.setattr(
        harness.importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find_spec(name)
    )
    fails(message="needs the package lm_eval: pip install 'mars-optim[eval]'")


def test_results_of_another_model_are_kept(tmp_path: Path) -> None:
    Results(tmp_path, "first", {"model": "a", "limit": None}).add(0, {"piqa": {"acc": 0.5, "num_questions": 2}})
    before = (tmp_path / "results.json").read_text()
    with pytest.raises(InputError, match=r"results of another model \('a', now 'b'\); choose another --output"):
        Results(tmp_path, "second", {"model": "b", "limit": None})
    assert (tmp_path / "results.json").read_text() == before
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(InputError, match=r"results.json is damaged"):
        Results(tmp_path, "first", {"model": "a", "limit": None})
