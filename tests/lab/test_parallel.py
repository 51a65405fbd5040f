"""Training on several processes is the training on one: the same losses and the same weights."""

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mars_lab.errors import InputError
from mars_lab.report.rows import read_rows
from mars_lab.training import launch
from mars_lab.training.config import RunConfig, TrainConfig
from mars_lab.training.loop import train
from mars_lab.training.processes import mesh_shape

from .forked import run_ranks
from .tiny_runs import outcome


class Case(NamedTuple):
    parallel: str
    size: int
    optimizer: str = "mars-adamw"
    mode: str = "approx"
    precision: str = "fp32"
    compile: bool = False
    shard_state: bool = False


CASES = [
    Case("ddp", 2, "mars-m", "exact"),
    Case("ddp", 2, "mars-m", shard_state=True),
    Case("ddp", 2, "adamw"),
    Case("ddp", 2, "shampoo"),
    Case("fsdp", 2, "muon"),
    Case("fsdp", 2, precision="bf16"),
    Case("fsdp", 2, compile=True),
    Case("tp", 2, "adamw"),
    Case("hsdp", 4, "mars-adamw", "exact"),
    Case("tp", 4),
]


def config_of(tiny: RunConfig, case: Case, group_size: int | None = None) -> RunConfig:
    changes = {"dropout": 0.0, "num_heads": 4, "num_layers": 1}
    model = dataclasses.replace(tiny.language.model, **changes)
    task = dataclasses.replace(tiny.language, model=model, sample_tokens=2)
    chosen: dict[str, Any] = {"name": case.optimizer, "mode": case.mode, "shard_state": case.shard_state}
    optimizer = dataclasses.replace(tiny.optimizer, lr=0.01, **chosen)
    settings: dict[str, Any] = {"parallel": case.parallel, "precision": case.precision, "compile": case.compile}
    train = dataclasses.replace(tiny.train, batch_size=4, num_steps=8, group_size=group_size, **settings)
    return dataclasses.replace(
        tiny, task=dataclasses.replace(task, eval_batch_size=3), optimizer=optimizer, train=train
    )


def join(config: RunConfig, runs: Path, name: str) -> None:
    launch.join(config, runs, name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny: RunConfig) -> Callable[[Case], Path]:
    """Trains a case by one process in fp32, once for each optimizer."""
    runs = tmp_path_factory.mktemp("alone")

    @cache
    def run(optimizer: str, mode: str) -> Path:
        config = config_of(tiny, Case("ddp", 1, optimizer, mode))
        task, folder = launch.start(config, runs, f"{optimizer}-{mode}", numbered=False)
        train(task, config, folder, quiet=True)
        return folder.path

    return lambda case: run(case.optimizer, case.mode)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_the_losses_and_weights_of_one_process(
    case: Case, alone: Callable[[Case], Path], tiny: RunConfig, tmp_path: Path
) -> None:
    run_ranks(join, case.size, config_of(tiny, case, group_size=2), tmp_path, "many")
    path, expected_path = tmp_path / "many", alone(case)
    rows, expected = (read_rows(p / "metrics.jsonl") for p in (path, expected_path))
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    # The sums over rows of a batch, and over a matrix, are taken in another order: rounding in float32, which 8 steps
    # let grow, or in bf16, which has 8 bits.
    tolerance = 1e-4 if case.precision == "fp32" else 2**-6
    for row, straight in zip(rows, expected, strict=True):
        assert row.keys() == straight.keys()
        for name in {"loss", "val_loss"} & row.keys():
            assert row[name] == pytest.approx(straight[name], rel=tolerance), (name, row["step"])
    state, wanted = (outcome(p)[0]["model"] for p in (path, expected_path))
    assert state.keys() == wanted.keys()
    for name, value in wanted.items():
        # Of a whole tensor: where a gradient is nearly 0, its rounding decides the sign of Adam's first steps. Torch's
        # Muon orthogonalises in bf16.
        error = (state[name] - value).norm() / value.norm()
        assert error < (5e-3 if case.precision == "fp32" and case.optimizer != "muon" else 0.1), name
    assert len(list((path / "tensorboard").iterdir())) == 1, "one process writes"


@pytest.mark.parametrize(
    ("parallel", "group", "size", "local", "expected"),
    [
        ("ddp", None, 8, 4, {"data": 8}),
        ("fsdp", None, 8, 4, {"shard": 8}),
        ("hsdp", None, 8, 4, {"data": 2, "shard": 4}),
        ("hsdp", 2, 8, 4, {"data": 4, "shard": 2}),
        ("tp", None, 8, 4, {"shard": 2, "tensor": 4}),
        ("tp", 8, 8, 4, {"shard": 1, "tensor": 8}),
    ],
)
def test_processes_are_arranged(parallel: Any, group: int | None, size: int, local: int, expected: Any) -> None:
    assert mesh_shape(TrainConfig(parallel=parallel, group_size=group), size, local) == expected


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        (
            {"batch_size": 6},
            4,
            r"train.batch-size \(6\) .* multiple of the 4 that share it; .* fits is 8",
        ),
        ({"parallel": "hsdp", "group_size": 3}, 4, r"train.group-size \(3\) must divide the number of processes \(4\)"),
        ({"parallel": "tp", "group_size": 3}, 4, r"train.group-size \(3\) must divide"),
    ],
)
def test_what_does_not_fit_is_refused(changes: Any, size: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        mesh_shape(TrainConfig(**changes), size, size)


def refusal(config: RunConfig, runs: Path) -> str:
    try:
        launch.join(config, runs, "refused")
    except InputError as error:
        return str(error)
    return "not refused"


def test_heads_stay_whole(tmp_path: Path, tiny: RunConfig) -> None:
    config = config_of(tiny, Case("tp", 2))
    for change, message in (({"num_heads": 1}, "must be a multiple of the 2"), ({"dropout": 0.1}, "must be 0 when")):
        model = dataclasses.replace(config.language.model, **change)
        bad = dataclasses.replace(config, task=dataclasses.replace(config.language, model=model))
        answers = run_ranks(refusal, 2, bad, tmp_path / str(len(message)))
        assert all(message in answer for answer in answers), answers


def test_diagnostics_see_the_state_that_other_processes_keep(tiny: RunConfig, tmp_path: Path) -> None:
    config = config_of(tiny, Case("ddp", 2, "mars-adamw", shard_state=True))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, num_steps=10))
    run_ranks(join, 2, config, tmp_path, "many")
    whole = dataclasses.replace(config.optimizer, shard_state=False)
    alone = dataclasses.replace(config, optimizer=whole)
    task, folder = launch.start(alone, tmp_path, "alone", numbered=False)
    train(task, alone, folder, quiet=True)
    row, expected = (
        next(row for row in read_rows(tmp_path / name / "metrics.jsonl") if "clip_rate" in row)
        for name in ("many", "alone")
    )
    assert row.keys() == expected.keys()
    for name in ("clip_rate", "momentum_norm", "grad_momentum_cosine", "grad_norm"):
        assert row[name] == pytest.approx(expected[name], rel=1e-3), name
