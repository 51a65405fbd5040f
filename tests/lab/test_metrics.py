"""Rows in the file and in Weights & Biases, whose place a recorder takes."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mars_lab.errors import InputError
from mars_lab.report.rows import read_rows
from mars_lab.training import config, run_folder
from mars_lab.training.config import RunConfig, TrainConfig
from mars_lab.training.metrics import Metrics
from mars_lab.training.run_folder import RunFolder


class Recorder:
    """Keeps what `wandb` is told."""

    def __init__(self) -> None:
        self.pages: list[dict[str, Any]] = []
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.exit_codes: list[int] = []

    def init(self, **options: Any) -> Any:
        self.pages.append(options)
        return SimpleNamespace(
            log=lambda values, step: self.rows.append((step, values)),
            finish=lambda exit_code: self.exit_codes.append(exit_code),
        )


def interrupted(folder: RunFolder) -> None:
    with Metrics(folder, 0, wandb=True) as metrics:
        metrics.log(1, {"loss": 3.0})
        metrics.log(2, {"loss": 2.5})
        raise KeyboardInterrupt


def test_weights_and_biases_gets_the_rows_and_finds_a_continued_run(
    tmp_path: Path, tiny: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", recorder)  # pyright: ignore[reportArgumentType]
    folder = run_folder.create(tmp_path, "run", tiny, numbered=False)
    with pytest.raises(KeyboardInterrupt):
        interrupted(folder)
    with Metrics(folder, 1, wandb=True) as metrics:
        metrics.log(2, {"loss": 2.5})
    first, second = recorder.pages
    assert first["id"] == second["id"]
    assert first["name"] == "run"
    assert first["config"]["optimizer"]["name"] == tiny.optimizer.name
    assert recorder.rows == [(1, {"loss": 3.0}), (2, {"loss": 2.5}), (2, {"loss": 2.5})]
    assert recorder.exit_codes == [1, 0]
    assert [row["step"] for row in read_rows(folder.metrics)] == [1, 2]


def test_without_the_package_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"train\.wandb needs the package wandb: pip install wandb"):
        TrainConfig(wandb=True)
