import dataclasses
import json
from pathlib import Path

import pytest

from mars_lab.errors import InputError
from mars_lab.recipes import sotu
from mars_lab.report import comparison
from mars_lab.report.rows import read_rows
from mars_lab.sweep.compare import CompareConfig, compare
from mars_lab.training.config import RunConfig

BASES = {name: recipe.config.optimizer for name, recipe in sotu.recipes().items()}


@pytest.fixture(scope="module")
def plan(tiny: RunConfig) -> CompareConfig:
    train = dataclasses.replace(tiny.train, num_steps=8, num_accumulation_steps=1)
    task = dataclasses.replace(tiny.language, sample_tokens=0)
    return CompareConfig(task, train, ("adamw", "mars-m", "mars-m-exact"), num_lrs=2, lr_factor=4.0, seeds=(0, 1))


@pytest.fixture(scope="module")
def finished(plan: CompareConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "compare"
    folder.parent.mkdir(exist_ok=True)
    compare(plan, BASES, folder)
    return folder


def test_every_optimizer_has_the_same_budget(finished: Path) -> None:
    rows = read_rows(finished / "runs.jsonl")
    for name in ("adamw", "mars-m", "mars-m-exact"):
        own = [row for row in rows if row["optimizer"] == name]
        assert len(own) == 3
        assert {row["tokens"] for row in own} == {8 * 2 * 16}
        tried = [row for row in own if row["seed"] == 0]
        assert tried[1]["lr"] == pytest.approx(4 * tried[0]["lr"])
        assert own[2]["lr"] == min(tried, key=lambda row: row["val_loss"])["lr"]


def test_the_results_are_those_of_the_runs(finished: Path) -> None:
    entries = {entry["optimizer"]: entry for entry in json.loads((finished / "compare.json").read_text())}
    for entry in entries.values():
        losses = [json.loads((finished / f / "summary.json").read_text())["val_loss"] for f in entry["folders"]]
        assert len(losses) == 2
        assert entry["val_loss"] == pytest.approx(sum(losses) / 2)
        assert entry["spread"] == pytest.approx(abs(losses[0] - losses[1]) / 2**0.5)
        assert entry["lr_at_edge"]
    assert entries["mars-m"]["gradient_evaluations_per_step"] == 1
    assert entries["mars-m-exact"]["gradient_evaluations_per_step"] == 2
    table = (finished / "compare.md").read_text()
    assert "| mars-m-exact |" in table
    assert "at the edge of those tried" in table
    for suffix in ("png", "svg"):
        assert (finished / f"compare.{suffix}").stat().st_size > 10_000


def test_the_rate_of_embeddings_keeps_its_ratio(finished: Path) -> None:
    configs = [json.loads(path.read_text())["optimizer"] for path in finished.glob("mars-m-lr*/config.json")]
    ratios = {round(config["lr_1d"] / config["lr"], 6) for config in configs}
    assert ratios == {0.5}


def test_a_second_call_repeats_nothing(finished: Path, plan: CompareConfig, capsys: pytest.CaptureFixture[str]) -> None:
    times = {path: path.stat().st_mtime_ns for path in finished.glob("*/metrics.jsonl")}
    before = (finished / "compare.json").read_text()
    compare(plan, BASES, finished)
    assert {path: path.stat().st_mtime_ns for path in finished.glob("*/metrics.jsonl")} == times
    assert (finished / "compare.json").read_text() == before
    assert "run 1 of" not in capsys.readouterr().out


def test_more_seeds_add_to_what_is_there(finished: Path, plan: CompareConfig) -> None:
    wider = dataclasses.replace(plan, optimizers=("adamw",), seeds=(0, 1, 2))
    before = len(list(finished.glob("*/config.json")))
    compare(wider, BASES, finished)
    assert len(list(finished.glob("*/config.json"))) == before + 1
    compare(plan, BASES, finished)


def test_a_folder_with_another_plan_is_refused(finished: Path, plan: CompareConfig) -> None:
    other = dataclasses.replace(plan, train=dataclasses.replace(plan.train, num_steps=9))
    with pytest.raises(InputError, match=r"was run with other settings; give this comparison another --name"):
        compare(other, BASES, finished)


def test_a_rate_that_diverges_is_a_result(plan: CompareConfig, tmp_path: Path) -> None:
    bases = {"adamw": dataclasses.replace(BASES["adamw"], lr=1e30), "mars-m": BASES["mars-m"]}
    config = dataclasses.replace(plan, optimizers=("adamw", "mars-m"), seeds=(0,))
    table = compare(config, bases, tmp_path / "compare")
    assert "| adamw | diverged | | 2 (2 diverged) | | |" in table
    assert table.index("mars-m") < table.index("adamw"), "the diverged one comes last"
    assert compare(config, bases, tmp_path / "compare") == table


def test_aggregation_by_hand(tmp_path: Path) -> None:
    def row(lr: float, seed: int, loss: float | None) -> dict[str, object]:
        folder = f"{lr}-{seed}"
        (tmp_path / folder).mkdir()
        steps = [{"step": i, "seconds": s, "loss": 1.0} for i, s in enumerate((5.0, 5.1, 5.2, 9.2, 9.3))]
        (tmp_path / folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
        result = {"val_loss": loss, "steps": 5, "tokens": 10, "seconds": 9.3, "gradient_evaluations_per_step": 1}
        return {"optimizer": "adamw", "lr": lr, "seed": seed, "folder": folder, **result}

    rows = [row(0.1, 0, 3.0), row(0.2, 0, 2.0), row(0.4, 0, None), row(0.2, 1, 2.4), row(0.2, 2, 2.2)]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (entry,) = comparison.aggregate(tmp_path / "runs.jsonl")
    assert (entry["runs"], entry["diverged"], entry["seeds"], entry["lr"]) == (5, 1, 3, 0.2)
    assert entry["val_loss"] == pytest.approx(2.2)
    assert entry["spread"] == pytest.approx(0.2)
    assert entry["lr_at_edge"] is False
    # The median: neither the first step, which warms up, nor one during which the machine was busy, counts.
    assert entry["milliseconds_per_step"] == pytest.approx(100)
