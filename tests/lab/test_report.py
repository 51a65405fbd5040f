import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mars_lab.cli import main
from mars_lab.errors import InputError
from mars_lab.report import discovery, run_record, settings
from mars_lab.report.curve import Curve
from mars_lab.report.findings import Findings, findings
from mars_lab.report.published import published
from mars_lab.report.rows import read_rows
from mars_lab.report.sensitivity import Point
from mars_lab.report.token_ratio import token_ratio
from mars_lab.training.config import RunConfig

from .report_runs import config, finished_run, write_run
from .tiny_runs import flags


def found(*places: Path, baseline: str | None = None) -> Findings:
    return findings(discovery.read_all(discovery.find(places), Console(quiet=True)), baseline)


def curve(values: list[float]) -> Curve:
    steps = np.arange(len(values), dtype=np.float64)
    return Curve(steps, 10 * steps, 0.5 * steps, np.array(values))


def test_thinning_keeps_every_spike_where_it_is() -> None:
    generator = np.random.default_rng(0)
    values = generator.standard_normal(100_000)
    spikes = 5000 * np.arange(20) + generator.integers(1000, 4000, size=20)
    values[spikes] = np.where(np.arange(20) % 2, 50.0, -50.0)
    steps = np.arange(100_000, dtype=np.float64)
    thin = Curve(steps, 7 * steps, 0.1 * steps, values).thinned(400)
    assert len(thin) <= 400
    assert set(spikes) <= set(thin.steps)
    assert np.array_equal(thin.value, values[thin.steps.astype(int)])
    assert np.array_equal(thin.tokens, 7 * thin.steps)
    assert (thin.steps[0], thin.steps[-1]) == (0, 99_999)
    assert np.all(np.diff(thin.steps) > 0)


@pytest.mark.parametrize("length", [1, 2, 399, 400, 401, 797])
def test_thinning_of_short_curves(length: int) -> None:
    thin = curve(list(range(length))).thinned(400)
    assert len(thin) == length if length <= 400 else len(thin) <= 400
    assert (thin.value[0], thin.value[-1]) == (0, length - 1)


def test_a_loss_is_reached_between_two_evaluations() -> None:
    falling = curve([5.0, 4.0, 2.0, 3.0, 1.0])
    assert falling.reaches(3.0) == 15.0
    assert falling.reaches(2.0) == 20.0
    assert falling.reaches(9.0) == 0.0
    assert falling.reaches(0.5) == math.inf


def test_a_run_is_what_its_folder_says(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "a", config("mars-m-exact", seed=3), [4.0, 3.0, 2.0])
    record = run_record.read(folder, "a")
    assert (record.optimizer, record.seed, record.state, record.final_loss) == ("mars-m-exact", 3, "finished", 2.0)
    assert (record.tokens, record.seconds, record.tokens_per_second, record.memory_mib) == (20, 1.0, 20.0, 102.0)
    assert record.curves["val_loss"].value.tolist() == [4.0, 3.0, 2.0]
    assert record.curves["loss"].steps.tolist() == [1, 2]


def test_runs_that_did_not_end_are_named_and_in_no_table(tmp_path: Path) -> None:
    finished_run(tmp_path / "good", config(seed=0), [4.0, 3.0])
    torn = write_run(tmp_path / "torn", config(seed=1), [4.0, 3.5])
    with (torn / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 2, "los')
    write_run(tmp_path / "burst", config(seed=2), [4.0, math.nan], {"val_loss": None, "diverged": "the loss is nan"})
    write_run(tmp_path / "new", config(seed=4), [])
    report = found(tmp_path)
    (result,) = report.results
    assert result.setting.finals == [3.0]
    notes = " ".join(report.notes)
    assert "1 of 4 runs are not finished: shown as curves, in no table of results: torn." in notes
    assert "1 of 4 runs diverged (the loss or a weight was not finite any more): burst." in notes
    assert "1 of 4 runs have taken no step yet and are not shown: new." in notes
    assert {run.name for run in report.runs} == {"good", "torn", "burst"}
    assert [len(run.curves["val_loss"]) for run in report.runs if run.name == "burst"] == [1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no run at"),
        (lambda path: path.mkdir(), "is no run and holds none"),
        (
            lambda path: (path / "export").mkdir(parents=True) or (path / "export/config.json").write_text("{}"),
            "no run",
        ),
        (lambda path: write_run(path / "a", config(), []), "none of the 1 runs has taken a step (a); train first"),
        (lambda path: (write_run(path, config(), [1.0]) / "metrics.jsonl").write_text("{}\nx\n"), "damaged (line 2:"),
        (lambda path: (write_run(path, config(), [1.0]) / "config.json").write_text("{"), "config.json is damaged"),
        (
            lambda path: (write_run(path, config(), [1.0]) / "config.json").write_text("{}"),
            "is no configuration of a run",
        ),
    ],
)
def test_what_is_no_run_is_said(make, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "place")
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(tmp_path / "place"), "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists(), "a mistake must not leave anything behind"


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2\n{"a": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_rows(path)


def test_a_run_named_twice_counts_once(tmp_path: Path) -> None:
    finished_run(tmp_path / "a", config(), [4.0, 3.0])
    assert len(discovery.find([tmp_path, tmp_path / "a"])) == 1
    other = finished_run(tmp_path / "elsewhere" / "a", config(seed=1), [4.0, 3.0])
    names = discovery.find([tmp_path / "a", other])
    assert len(set(names.values())) == 2


def test_settings_are_named_by_what_differs(tmp_path: Path) -> None:
    for lr, seed in itertools.product((0.1, 0.2), (0, 1)):
        values = config("mars-m", lr=lr, seed=seed, lr_1d=lr / 2, clip_norm=1.0 if lr == 0.1 else None)
        finished_run(tmp_path / f"m{lr}-{seed}", values, [4.0, 3.0 + lr + seed])
    finished_run(tmp_path / "adamw", config(betas=[0.5, 0.5]), [4.0, 3.5])
    runs = discovery.read_all(discovery.find([tmp_path]), Console(quiet=True))
    groups = {setting.label: setting for setting in settings.group(runs)}
    # lr_1d goes with lr, the optimizers' other differences are no settings of theirs.
    assert set(groups) == {"adamw", "mars-m, lr 0.1, clip_norm 1", "mars-m, lr 0.2, clip_norm None"}
    assert groups["mars-m, lr 0.1, clip_norm 1"].mean == pytest.approx(3.6)
    assert groups["mars-m, lr 0.1, clip_norm 1"].spread == pytest.approx(0.5**0.5)


def test_an_optimizer_stands_at_the_setting_with_most_seeds(tmp_path: Path) -> None:
    for seed in (0, 1):
        finished_run(tmp_path / f"many{seed}", config(lr=0.1, seed=seed), [4.0, 3.0])
    finished_run(tmp_path / "lucky", config(lr=0.2), [4.0, 1.0])
    finished_run(tmp_path / "tuning" / "tried", config(lr=0.4), [4.0, 0.5])
    report = found(tmp_path)
    (result,) = report.results
    assert (result.setting.label, result.setting.mean) == ("adamw, lr 0.1", 3.0)
    assert any(setting.label == "adamw, lr 0.4 (tuning)" for setting in report.settings)


def test_different_budgets_are_pointed_out(tmp_path: Path) -> None:
    finished_run(tmp_path / "a", config("adamw"), [4.0, 3.0])
    longer = config("mars-m")
    longer["train"]["num_steps"] = 9
    longer["task"]["data"]["cache"] = "elsewhere"
    finished_run(tmp_path / "b", longer, [4.0, 3.0])
    assert "The optimizers were not run alike; they differ in train.num_steps." in " ".join(found(tmp_path).notes)


def test_the_ratio_of_tokens_by_hand(tmp_path: Path) -> None:
    """With two seeds a side there are 16 equally likely draws; 2.5% of them are less than one."""
    own, other = ([5.0, 4.0, 3.0, 2.0, 1.0], [5.0, 3.5, 3.0, 2.5, 0.0]), ([5.0, 4.5, 4.0, 3.5, 3.1], [5, 5, 4, 3, 2.3])
    for seed in (0, 1):
        finished_run(tmp_path / f"m{seed}", config("mars-m", seed=seed), own[seed])
        finished_run(tmp_path / f"a{seed}", config("adamw", seed=seed), other[seed])
    (result,) = (r for r in found(tmp_path).results if r.setting.optimizer == "mars-m")
    assert result.ratio is not None

    def tokens(rows: np.ndarray, target: float) -> float:  # np.interp wants rising values
        return float(np.interp(-target, -rows.mean(axis=0), [0, 10, 20, 30, 40])) / 40

    draws = [
        tokens(np.array([own[i], own[j]]), (other[k][-1] + other[m][-1]) / 2)
        for i, j, k, m in itertools.product((0, 1), repeat=4)
    ]
    assert result.ratio.ratio == pytest.approx(tokens(np.array(own), 2.7))
    assert result.ratio.interval == pytest.approx((min(draws), max(draws)))


def test_a_loss_that_is_not_reached_has_no_number(tmp_path: Path) -> None:
    for seed in (0, 1):
        finished_run(tmp_path / f"m{seed}", config("mars-m", seed=seed), [5.0, 4.0])
        finished_run(tmp_path / f"a{seed}", config("adamw", seed=seed), [5.0, 3.0])
    finished_run(tmp_path / "muon", config("muon"), [5.0, 1.0])
    ratios = {result.setting.optimizer: result.ratio for result in found(tmp_path).results}
    assert ratios["mars-m"] is not None
    assert ratios["mars-m"].interval == (math.inf, math.inf)
    assert ratios["muon"] is not None
    assert (ratios["muon"].ratio, ratios["muon"].interval) == (0.5, None)
    assert ratios["adamw"] is None


def test_seeds_with_other_steps_have_no_ratio(tmp_path: Path) -> None:
    finished_run(tmp_path / "m0", config("mars-m", seed=0), [5.0, 4.0])
    finished_run(tmp_path / "m1", config("mars-m", seed=1), [5.0, 4.0, 3.0])
    finished_run(tmp_path / "a", config(), [5.0, 4.0])
    chosen = settings.best(settings.group(discovery.read_all(discovery.find([tmp_path]), Console(quiet=True))))
    assert token_ratio(chosen["mars-m"], chosen["adamw"]) is None


def test_another_baseline(tmp_path: Path) -> None:
    finished_run(tmp_path / "m", config("mars-m"), [5.0, 4.0])
    finished_run(tmp_path / "a", config(), [5.0, 3.0])
    assert found(tmp_path).baseline == "adamw"
    assert found(tmp_path, baseline="mars-m").baseline == "mars-m"
    with pytest.raises(InputError, match="no finished run of the baseline 'lion'; finished: adamw, mars-m"):
        found(tmp_path, baseline="lion")


def test_sensitivity_is_of_the_tuning_and_the_best_of_the_rest(tmp_path: Path) -> None:
    for lr, gamma, loss in ((0.1, 0.0, 3.0), (0.1, 0.5, 2.0), (0.2, 0.0, 4.0), (0.2, 0.5, 5.0)):
        values = config("mars-m", lr=lr, gamma=gamma)
        finished_run(tmp_path / "tuning" / f"{lr}-{gamma}", values, [9.0, loss])
    finished_run(tmp_path / "final" / "m", config("mars-m", lr=0.1, gamma=0.5, seed=1), [9.0, 1.0])
    longer = config("mars-m", lr=0.8)
    longer["train"]["num_steps"] = 9
    finished_run(tmp_path / "tuning" / "longer", longer, [9.0, 0.1])
    by_lr, by_gamma = found(tmp_path).sensitivities
    assert (by_lr.name, by_lr.lines) == ("lr", {"mars-m": [Point(0.1, 2.0, 2.0, 2.0), Point(0.2, 4.0, 4.0, 4.0)]})
    assert by_gamma.lines == {"mars-m": [Point(0.0, 3.0, 3.0, 3.0), Point(0.5, 2.0, 2.0, 2.0)]}
    edge = [note for note in found(tmp_path).notes if "smallest or largest of its grid" in note]
    assert len(edge) == 2


def test_sensitivity_compares_equal_seeds(tmp_path: Path) -> None:
    """As after `mars compare`: the best rate of the first seed has further ones, with which no other was tried."""
    for lr, seed, loss in ((0.1, 0, 2.0), (0.1, 1, 9.0), (0.2, 0, 3.0)):
        finished_run(tmp_path / f"{lr}-{seed}", config(lr=lr, seed=seed), [9.0, loss])
    (by_lr,) = found(tmp_path).sensitivities
    assert by_lr.lines == {"adamw": [Point(0.1, 2.0, 2.0, 2.0), Point(0.2, 3.0, 3.0, 3.0)]}


def test_accuracies_are_shown_where_there_are_some(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = finished_run(tmp_path / "runs" / "a", config(), [4.0, 3.0])
    rows = [
        row | ({"val_accuracy": 0.9125} if "val_loss" in row else {}) for row in read_rows(folder / "metrics.jsonl")
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    assert "| accuracy |" in capsys.readouterr().out
    assert "| 91.25% |" in (tmp_path / "out" / "results.md").read_text()


def test_a_label_is_what_an_optimizer_is_called(tmp_path: Path) -> None:
    for number, label in enumerate(("", "lion")):
        values = config("mars-lion")
        values["optimizer"]["label"] = label
        finished_run(tmp_path / str(number), values, [4.0, 3.0])
    main(["report", str(tmp_path), "--out", str(tmp_path / "out")])
    rows = (tmp_path / "out" / "results.md").read_text().splitlines()[2:4]
    assert sorted(row.split("|")[1].strip().split(",")[0] for row in rows) == ["lion", "mars-lion"]


def test_published_figures_are_for_the_same_model_data_and_budget() -> None:
    values = config("adamw")
    values["task"]["model"] |= {
        "num_layers": 12, "num_heads": 12, "width": 768, "context_length": 1024, "vocab_size": 50304
    }  # fmt: skip
    values["task"]["data"]["tokens"] = "data/openwebtext"
    steps_100k = 480 * 1024 * 100_000
    paper = published(values, "adamw", steps_100k)
    assert paper is not None
    assert (paper.loss, paper.where) == (2.885, "MARS paper: gpt2-small-owt-adamw, 50B tokens")
    exact = published(values, "mars-adamw-exact", steps_100k)
    assert exact is not None
    assert exact.loss == 2.847
    assert published(values, "mars-lion", steps_100k) is None
    assert published(values, "adamw", 1e9) is None
    assert published(config("adamw"), "adamw", steps_100k) is None
    values["task"]["data"]["tokens"] = "data/fineweb-edu"
    values["optimizer"]["gamma"] = 0.01
    read_off = published(values, "mars-m", steps_100k)
    assert read_off is not None
    assert (read_off.loss, read_off.where[:28]) == (2.850, "MARS-M paper, read off a plo")
    images = {"optimizer": {}, "task": {"model": {"name": "resnet18", "width": 64}, "data": {"dataset": "cifar100"}}}
    of_cifar = published(images, "mars-lion-exact", 200 * 50_000)
    assert of_cifar is not None
    assert (of_cifar.loss, of_cifar.accuracy) == (0.991, 76.15)
    assert published(images, "mars-lion-exact", 20 * 50_000) is None


def test_many_rows_are_read_by_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(3):
        finished_run(tmp_path / f"a{seed}", config(seed=seed), [4.0, 3.0 + seed])
    monkeypatch.setattr(discovery, "_LARGE", 1)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    records = discovery.read_all(discovery.find([tmp_path]), Console(quiet=True))
    assert [(record.name, record.final_loss) for record in records] == [("a0", 3.0), ("a1", 4.0), ("a2", 5.0)]


def test_report_of_real_runs(tmp_path: Path, tiny: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    runs, out = tmp_path / "runs", tmp_path / "out"
    for recipe, seed in (("mars-m", "0"), ("mars-m", "1"), ("adamw", "0")):
        name = ["--optimizer.name", recipe, "--train.seed", seed, "--name", f"{recipe}-{seed}", "--runs", str(runs)]
        main(["train", *flags(tiny), *name])
    losses = {path.parent.name: json.loads(path.read_text())["val_loss"] for path in runs.glob("*/summary.json")}
    capsys.readouterr()
    main(["report", str(runs), "--out", str(out)])
    table = capsys.readouterr().out
    assert f"| {(losses['mars-m-0'] + losses['mars-m-1']) / 2:.4f} ± " in table
    assert f"| {losses['adamw-0']:.4f} |" in table
    assert (out / "results.md").read_text() in table
    assert {path.name for path in out.iterdir()} == {"report.html", "results.md", "loss.png", "loss.svg"}
