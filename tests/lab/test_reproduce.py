"""`mars reproduce`: whole tables at a tiny scale, stopped, killed and continued."""

import json
import re
import signal
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from lm_eval.models.huggingface import HFLM

from mars_lab.cli import main
from mars_lab.errors import DivergenceError, TrainingError
from mars_lab.report.rows import read_rows
from mars_lab.reproduce import training
from mars_lab.reproduce import worker as reproduce_worker
from mars_lab.reproduce.catalogue import EXHIBITS
from mars_lab.reproduce.exhibit import Exhibit, Row
from mars_lab.reproduce.plan import Plan
from mars_lab.sweep import worker as sweep_worker
from mars_lab.sweep import workers
from mars_lab.sweep.attempt import attempt
from mars_lab.training import launch
from mars_lab.training.run_folder import RunFolder

from .task_rows import words, write_official
from .tiny_runs import assert_refused, start_mars

NAME = "mars/learning-rates"


def arguments(corpus: Path, name: str = NAME, *more: str) -> list[str]:
    return ["reproduce", name, "--scale", "smoke", "--corpus", str(corpus), *more]


def wait_for_summaries(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while len(list(folder.glob("runs/*/summary.json"))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def states(folder: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("runs/*/summary.json")}


@pytest.fixture(scope="module")
def reproduced(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine runs, stopped by Ctrl-C, killed, and brought to their end by two at once; the folder of the scale."""
    place = tmp_path_factory.mktemp("reproduced")
    folder = place / "runs" / "reproduce" / "smoke"
    command = arguments(corpus, NAME, "--seeds", "3")
    first = start_mars(*command, cwd=place)
    wait_for_summaries(folder, 1, first)
    first.send_signal(signal.SIGINT)
    out, _ = first.communicate(timeout=60)
    assert first.returncode == 130, out
    assert "The same command again continues." in out
    before = states(folder)
    assert 0 < len(before) < 9
    second = start_mars(*command, cwd=place)
    wait_for_summaries(folder, len(before) + 1, second)
    second.kill()
    second.communicate(timeout=60)
    then = states(folder)
    assert len(then) < 9, "killed too late to show anything"
    twin = start_mars(*command, cwd=place)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        main(command)
    out, _ = twin.communicate(timeout=60)
    assert twin.returncode == 0, out
    after = states(folder)
    assert len(after) == 9
    assert {name: after[name] for name in then} == then, "finished runs are not repeated"
    assert {name: after[name] for name in before} == before
    return folder


def test_the_table_is_what_the_metrics_say(reproduced: Path) -> None:
    table = json.loads((reproduced / NAME / "table.json").read_text())
    recipes = [row.recipe for row in EXHIBITS[NAME].runs]
    assert len(table["rows"]) == 2 * len(recipes)
    for recipe, row in zip(recipes, table["rows"][len(recipes) :], strict=True):
        finals = []
        for seed in (0, 1, 2):
            rows = read_rows(reproduced / "runs" / f"{recipe}-seed{seed}" / "metrics.jsonl")
            finals.append(min(row["val_loss"] for row in rows if "val_loss" in row and row["step"] > 0))
        assert row["values"] == pytest.approx(finals)
        assert row["mean"] == pytest.approx(statistics.fmean(finals))
        assert row["spread"] == pytest.approx(statistics.stdev(finals))
    assert [row["published"] for row in table["rows"][3:]] == [2.885, None, 2.852]
    for ordering in table["orderings"]:
        means = {row["row"]: row["mean"] for row in table["rows"] if row["quantity"] == ordering["quantity"]}
        assert ordering["held"] == (means[ordering["better"]] < means[ordering["worse"]])


def test_the_page_has_published_beside_measured(reproduced: Path) -> None:
    page = (reproduced / NAME / "report.html").read_text()
    assert "MARS paper, Figure 6" in page
    assert "Published orderings" in page
    assert "adamw-lr-x5 before adamw" in page
    assert all(label in page for label in ("training loss", "validation loss", "seconds", "steps"))
    assert {"loss.png", "loss.svg", "results.md"} <= {path.name for path in (reproduced / NAME).iterdir()}


def test_runs_are_shared_and_continued_only_as_they_were_begun(
    reproduced: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [Plan(EXHIBITS[name], "smoke", reproduced).runs for name in (NAME, "mars/learning-rate-grid")]
    assert len(folders[0].keys() & folders[1].keys()) == 2
    monkeypatch.chdir(reproduced.parents[2])
    before = states(reproduced)
    main(arguments(corpus, NAME, "--seeds", "2"))
    assert states(reproduced) == before
    out = capsys.readouterr().out
    assert re.search(r"\| best validation loss \| adamw \| 2.885 \| \d\.\d{4} ± \d\.\d{4} \| 2 \|", out)
    other = tmp_path / "other.jsonl"
    other.write_text(corpus.read_text())
    with pytest.raises(SystemExit):
        main(arguments(other))
    assert "was begun with other settings (another --corpus, perhaps)" in capsys.readouterr().err
    assert states(reproduced) == before


def test_downstream_tables_ask_every_run(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(workers, "run", lambda module, folder, *rest: reproduce_worker.work(folder))
    write_official(tmp_path / "questions", 8)
    name = "mars/fwe-small-tasks"
    more = ["--tasks", "hellaswag", "piqa", "last_word", "--shots", "0", "5", "--data", "questions"]
    paragraphs = [" ".join(words(7, 31 * p + s).capitalize() + "." for s in range(12)) for p in range(9)]
    (tmp_path / "held-out.jsonl").write_text(json.dumps({"text": "\n\n".join(paragraphs)}) + "\n")
    more += ["--books", "held-out.jsonl", "--num-passages", "4"]
    main(arguments(corpus, name, *more))
    out = capsys.readouterr().out
    root = tmp_path / "runs" / "reproduce" / "smoke"
    table = {(row["row"], row["quantity"]): row for row in json.loads((root / name / "table.json").read_text())["rows"]}
    for label in ("adamw", "mars-adamw"):
        (path,) = (root / "runs" / f"gpt2-small-fwe-{label}-seed0" / "evaluation").glob("*/results.json")
        shots = json.loads(path.read_text())["shots"]
        for num, task, key, title in (
            ("0", "hellaswag", "acc_norm", "HellaSwag, 0-shot, %"),
            ("5", "piqa", "acc_norm", "PIQA, 5-shot, %"),
            ("0", "last_word", "acc", "last_word, 0-shot, %"),
        ):
            assert table[label, title]["values"] == [pytest.approx(100 * shots[num][task][key])]
    assert table["GPT-2 small, OpenAI", "HellaSwag, 0-shot, %"]["published"] == 31.14
    assert "| HellaSwag, 0-shot, % | mars-adamw | 36.91 |" in out
    assert "| mars-adamw before adamw | HellaSwag, 0-shot, % | yes, by 0.65 |" in out
    calls: list[int] = []
    wrapped: Any = HFLM
    monkeypatch.setattr(wrapped, "_model_call", lambda *a, **k: calls.append(1))
    main(arguments(corpus, name, *more))
    assert not calls, "nothing is asked twice"


def one_row(root: Path, corpus: Path, **options: Any) -> Plan:
    exhibit = Exhibit("mars/one", "nowhere", "one row", (Row("gpt2-small-owt-adamw"),))
    return Plan(exhibit, "smoke", root, corpus=str(corpus), **options)


def test_rows_are_tuned_when_asked(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(workers, "run", lambda module, folder, *rest: sweep_worker.work(folder))
    plan = one_row(tmp_path / "root", corpus, num_lrs=2, lr_factor=100.0)
    training.train(plan, 1, 1)
    sweep = plan.sweep("gpt2-small-owt-adamw")
    tried = {sweep.tuning_run("gpt2-small-owt-adamw", number).config().optimizer.lr: number for number in (0, 1)}
    losses = {lr: (sweep.tuning_run("gpt2-small-owt-adamw", n).summary() or {})["val_loss"] for lr, n in tried.items()}
    final = plan.run("gpt2-small-owt-adamw", 0)
    assert final.config().optimizer.lr == min(losses, key=lambda lr: losses[lr])
    assert final.summary() is not None


def test_runs_on_several_processes(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = one_row(tmp_path / "root", corpus)
    training.train(plan, 1, 2)
    summary = plan.run("gpt2-small-owt-adamw", 0).summary()
    assert summary is not None
    assert summary["steps"] == 5


def test_a_divergence_is_a_result_and_a_full_disk_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)

    def fails(error: Exception) -> None:
        def resume(*args: object, **kwargs: object) -> None:
            raise error

        monkeypatch.setattr(launch, "resume", resume)

    fails(TrainingError("the disk is full"))
    with pytest.raises(TrainingError, match="full"):
        attempt(folder)
    assert folder.summary() is None
    fails(DivergenceError("the loss is nan"))
    assert attempt(folder) == folder.summary() == {"val_loss": None, "diverged": "the loss is nan"}


def test_workers_get_gpus_of_their_own() -> None:
    assert training.device_shares(["0", "1", "2", "3"], 2, 2) == [
        {"CUDA_VISIBLE_DEVICES": "0,1"},
        {"CUDA_VISIBLE_DEVICES": "2,3"},
    ]
    assert training.device_shares(["3", "5"], 3, 1)[2] == {"CUDA_VISIBLE_DEVICES": "3"}
    assert training.device_shares([], 2, 1) == training.device_shares(["0", "1"], 1, 2) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["mars/gama"], "no table or figure 'mars/gama'; nearest: mars/gamma"),
        (["mars/settings"], "mars/settings (MARS paper, Table 3) can't be reproduced: settings of every run"),
        (["mars/gamma"], "no token file at 'data/openwebtext'"),
        (["mars/gamma", "--scale", "cpu", "--corpus", "missing"], "no corpus at 'missing'"),
        (["mars/cifar10-cnn", "--scale", "smoke"], "give what mars/cifar10-cnn is trained on with --corpus PATH"),
        (["mars/gamma", "--scale", "smoke", "--seeds", "0"], "--seeds and --num-lrs must be at least 1"),
        (["mars/learning-rates", "--scale", "smoke", "--num-lrs", "2"], "compares learning rates, which --num-lrs 2"),
        (["mars/gamma", "--scale", "smoke", "--workers", "0"], "--workers and --nproc must be at least 1, got 0 and 1"),
        (["mars/gamma", "--scale", "smoke", "--tasks", "books"], "give their file or folder with --books"),
        (
            ["mars/gamma", "--scale", "smoke", "--tasks", "no_such_task"],
            "no task 'no_such_task' in lm-evaluation-harness",
        ),
        (["mars/fwe-xl-tasks", "--scale", "smoke", "--data", "."], "holds nothing for the part 'test' of arc_easy"),
        (["mars/cifar10-cnn", "--scale", "smoke", "--tasks", "nine"], "trains image classifiers, which --tasks can't"),
    ],
)
def test_mistakes_end_in_one_line_and_leave_nothing(
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(["reproduce", *options], message, tmp_path, capsys)
