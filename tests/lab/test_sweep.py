import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import Trial

from mars_lab.cli import main
from mars_lab.errors import InputError, TrainingError
from mars_lab.recipes import sotu
from mars_lab.report.rows import read_rows
from mars_lab.sweep import budget, space
from mars_lab.sweep import plan as plans
from mars_lab.sweep.claim import claim
from mars_lab.sweep.plan import Plan, SweepConfig
from mars_lab.sweep.studies import Studies
from mars_lab.sweep.sweep import sweep
from mars_lab.sweep.worker import work
from mars_lab.training.config import RunConfig

from .tiny_runs import assert_refused, flags, start_mars

BASES = {name: recipe.config.optimizer for name, recipe in sotu.recipes().items()}
TWO = {name: BASES[name] for name in ("adamw", "mars-m")}


@pytest.fixture(scope="module")
def base(tiny: RunConfig) -> RunConfig:
    train = dataclasses.replace(tiny.train, num_steps=8, num_accumulation_steps=1, checkpoint_every=3)
    return dataclasses.replace(tiny, task=dataclasses.replace(tiny.task, sample_tokens=0), train=train)


def make(base: RunConfig, folder: Path, **options: Any) -> Plan:
    given = {"optimizers": ("adamw", "mars-m"), "num_lrs": 2, "lr_factor": 4.0, "seeds": 2, **options}
    return plans.make(SweepConfig(base, **given), BASES, folder)


def summaries(folder: Path) -> dict[str, dict[str, Any]]:
    """By run; without what the machine decides."""
    found = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/*/summary.json")}
    return {name: {k: v for k, v in summary.items() if k != "seconds"} for name, summary in found.items()}


@pytest.fixture(scope="module")
def finished(base: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    plan = make(base, tmp_path_factory.mktemp("sweep") / "undisturbed")
    plans.begin(plan)
    work(plan.folder)
    return plan


def test_the_best_of_equal_budgets_runs_with_other_seeds(finished: Plan) -> None:
    results = summaries(finished.folder)
    assert len(results) == 2 * (2 + 2)
    assert len({summary["tokens"] for summary in results.values()}) == 1
    for name in finished.optimizers:
        tried = {n: results[f"{name}-{n:03}"]["val_loss"] for n in (0, 1)}
        configs = {n: finished.tuning_run(name, n).config() for n in tried}
        assert configs[1].optimizer.lr == pytest.approx(4 * configs[0].optimizer.lr)
        assert {config.train.seed for config in configs.values()} == {0}
        for seed in (1, 2):
            final = finished.final_run(name, seed).config()
            assert final.optimizer == configs[min(tried, key=lambda n: tried[n])].optimizer
            assert final.train.seed == seed
    assert finished.tuning_run("mars-m", 0).config().optimizer.lr_1d == pytest.approx(0.005 / 2)


def test_budgets_are_reported(finished: Plan) -> None:
    table = budget.table(finished, Studies(finished))
    rows = {row[0]: dict(zip(table.headings, row, strict=True)) for row in table.rows}
    for row in rows.values():
        assert (row["trials"], row["diverged"], row["pruned"]) == ("2", "0", "0")
        assert (row["steps"], row["tokens"]) == ("16", str(2 * 8 * 2 * 16))
        assert row["best"].startswith("lr 0.0")


def test_a_second_call_repeats_nothing(finished: Plan) -> None:
    times = {path: path.stat().st_mtime_ns for path in finished.folder.glob("*/*/metrics.jsonl")}
    work(finished.folder)
    assert {path: path.stat().st_mtime_ns for path in finished.folder.glob("*/*/metrics.jsonl")} == times


def test_a_killed_trial_is_continued_by_another_process(base: RunConfig, finished: Plan, tmp_path: Path) -> None:
    plan = make(base, tmp_path / "sweep")
    plans.begin(plan)
    command = [sys.executable, "-m", "mars_lab.sweep.worker", str(plan.folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    metrics = plan.tuning_run("mars-m", 0).metrics
    wait_until(lambda: len(read_rows(metrics)) > 4, process)
    process.kill()
    process.communicate(timeout=30)
    assert plan.tuning_run("mars-m", 0).summary() is None, "killed too late to show anything"
    assert [trial.state.is_finished() for trial in Studies(plan).trials("mars-m")] == [False]
    work(plan.folder)
    assert len(Studies(plan).trials("mars-m")) == 2
    assert summaries(plan.folder) == summaries(finished.folder), "bit for bit the undisturbed sweep"


def test_ctrl_c_then_the_same_command(
    base: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--optimizers", "adamw", "mars-m", "--num-lrs", "2", "--lr-factor", "4", "--workers", "2"]
    arguments += ["--seeds", "2", *flags(dataclasses.replace(base, optimizer=BASES["mars-m"]))]
    process = start_mars("sweep", *arguments, cwd=tmp_path)
    folder = tmp_path / "runs" / "sweep"
    wait_until(lambda: any(folder.glob("tuning/*/summary.json")), process)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert "The same command again continues." in out
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*/summary.json")}
    assert 0 < len(before) < 8
    monkeypatch.chdir(tmp_path)
    main(["sweep", *arguments])
    assert "| mars-m, lr " in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(summaries(folder)) == 8
    page = (folder / "report.html").read_text()
    assert "Budget of the tuning" in page
    assert "final validation loss against lr" in page
    assert "| adamw | 2 | 0 | 0 | 16 | 512 |" in (folder / "results.md").read_text()


@pytest.mark.parametrize("search", ["grid", "random"])
def test_a_trial_that_ended_before_it_began_is_handed_out_again(
    search: str, base: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = 2 if search == "random" else None
    plan = make(base, tmp_path / "sweep", search=search, trials=trials, optimizers=("adamw",), seeds=1)
    plans.begin(plan)
    with monkeypatch.context() as patch:
        patch.setattr(Trial, "suggest_float", killed)
        patch.setattr(Trial, "suggest_categorical", killed)
        with pytest.raises(KeyboardInterrupt):
            work(plan.folder)
    assert [trial.state.name for trial in Studies(plan).trials("adamw")] == ["RUNNING"]
    work(plan.folder)
    assert [trial.state.name for trial in Studies(plan).trials("adamw")] == ["COMPLETE"] * 2
    assert len(summaries(plan.folder)) == 3


def killed(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def wait_until(is_true: Any, process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + 90
    while not is_true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        (2, InputError, "^config.json is damaged$"),
        (1, TrainingError, r"worker 0 ended with exit code 1 \(config.json is"),
    ],
)
def test_a_worker_that_fails_is_heard(
    code: int, error: type[Exception], message: str, base: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = tmp_path / "worker"
    worker.write_text(f"#!/bin/sh\necho 'mars worker: config.json is damaged' >&2\nexit {code}\n")
    worker.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(worker))
    with pytest.raises(error, match=message):
        sweep(make(base, tmp_path / "sweep"), 1)


def test_samplers_draw_equally_many(base: RunConfig, tmp_path: Path) -> None:
    plan = make(
        base,
        tmp_path / "sweep",
        search="tpe",
        trials=3,
        seeds=1,
        space=("mars-m:gamma=0.01,0.1",),
        optimizers=tuple(TWO),
    )
    plans.begin(plan)
    work(plan.folder)
    for name, lr in (("adamw", 3e-3), ("mars-m", 0.02)):
        trials = Studies(plan).trials(name)
        rates = [trial.params["lr"] for trial in trials]
        assert len(set(rates)) == 3
        assert all(lr / 4 <= rate <= lr for rate in rates)
        assert all(("gamma" in trial.params) == (name == "mars-m") for trial in trials)


def test_what_falls_behind_is_pruned_and_what_diverges_is_last(base: RunConfig, tmp_path: Path) -> None:
    rates = ("adamw:lr=0.001,0.002,5,1e30",)
    plan = make(base, tmp_path / "sweep", prune="median", seeds=1, optimizers=("adamw",), space=rates)
    plans.begin(plan)
    work(plan.folder)
    states = [trial.state.name for trial in Studies(plan).trials("adamw")]
    assert states[:3] == ["COMPLETE", "COMPLETE", "PRUNED"]
    pruned = plan.tuning_run("adamw", 2).summary()
    assert pruned is not None
    assert pruned["steps"] < 8
    assert plan.tuning_run("adamw", 3).summary() is not None
    (row,) = budget.table(plan, Studies(plan)).rows
    assert row[3] in ("1", "2")
    final = plan.final_run("adamw", 1).config()
    assert final.optimizer.lr in (0.001, 0.002)


def test_an_optimizer_that_always_diverges_has_no_final_runs(base: RunConfig, tmp_path: Path) -> None:
    plan = make(base, tmp_path / "sweep", optimizers=("adamw",), space=("lr=1e29,1e30",), seeds=1)
    plans.begin(plan)
    work(plan.folder)
    assert not (plan.folder / "final").exists()
    assert budget.table(plan, Studies(plan)).rows[0][2] == "2"


def test_a_claim_is_of_one_process(tmp_path: Path) -> None:
    first = claim(tmp_path / "run")
    assert first is not None
    assert claim(tmp_path / "run") is None
    first.release()
    second = claim(tmp_path / "run")
    assert second is not None
    second.release()


def test_spaces_by_hand() -> None:
    found = space.spaces(TWO, ["mars-m:gamma=0.1,0", "adamw:lr=4,1,3,2"], num_lrs=2, lr_factor=2.0)
    assert found == {"adamw": {"lr": [1, 2, 3, 4]}, "mars-m": {"lr": [0.01, 0.02], "gamma": [0, 0.1]}}
    points = space.grid(found["mars-m"])
    assert points == [{"lr": lr, "gamma": gamma} for lr in (0.01, 0.02) for gamma in (0, 0.1)]
    assert space.require_equal({name: len(space.grid(own)) for name, own in found.items()}) == 4
    assert space.at(TWO["mars-m"], {"lr": 0.2}).lr_1d == pytest.approx(0.1)
    assert space.at(TWO["mars-m"], {"lr": 0.2, "lr_1d": 0.3}).lr_1d == 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optimizers", "adam"], "no optimizer 'adam' to compare; known: mars-m, adamw"),
        (["--optimizers", "adamw", "adamw"], "names one twice"),
        (["--space", "mars-m:gamma=0.1,0.2"], "unequal budgets: adamw has 3 trials, muon has 3 trials"),
        (["--space", "gamma=0.1,0.2"], "adamw has no gamma; write it for the others alone, as in mars-"),
        (["--space", "gama=0.1"], "no hyperparameter 'gama'; did you mean 'gamma'?"),
        (["--space", "lr=fast"], "must be FIELD=NUMBER,NUMBER"),
        (["--space", "lion:lr=1"], "lion is none of --optimizers"),
        (["--space", "lr=-1"], "optimizer.lr"),
        (["--trials", "3"], "--trials (at least 1) belongs to --search random and tpe"),
        (["--search", "tpe"], "got --search tpe with no --trials"),
        (["--seeds", "0"], "a sweep needs at least one"),
        (["--optimizer.lr", "1"], "a sweep takes its optimizers from recipes"),
        (["--corpus", "missing.txt"], "no corpus at 'missing.txt'"),
        (["sotuu"], "no recipe 'sotuu'"),
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
    assert_refused(["sweep", *options], message, tmp_path, capsys)


def test_a_storage_that_cannot_be_opened_is_named(base: RunConfig, tmp_path: Path) -> None:
    for url in ("nonsense", "sqlite:////nowhere/trials.db", "nosuch://host/name"):
        plan = make(base, tmp_path / "sweep", storage=url)
        with pytest.raises(InputError, match="cannot be opened"):
            Studies(plan)


def test_a_folder_has_one_plan(base: RunConfig, tmp_path: Path) -> None:
    plan = make(base, tmp_path / "sweep")
    plans.begin(plan)
    assert plans.read(plan.folder) == plan
    plans.begin(plan)
    plans.begin(make(base, plan.folder, seeds=3))
    with pytest.raises(InputError, match="3 --seeds already"):
        plans.begin(plan)
    with pytest.raises(InputError, match="begun with other settings; give this sweep another --name"):
        plans.begin(make(base, plan.folder, num_lrs=3, seeds=3))
