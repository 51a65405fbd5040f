"""A checkpoint saved by any number of processes, in any layout, is continued by any other."""

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint.state_dict_loader as dcp
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from mars_lab.cli import main
from mars_lab.errors import InputError
from mars_lab.tasks.language import LanguageTask
from mars_lab.training import launch, optimizers, run_folder
from mars_lab.training.checkpoint import plain
from mars_lab.training.config import RunConfig
from mars_lab.training.interruption import Interrupted
from mars_lab.training.loop import train
from mars_lab.training.processes import joined
from mars_lab.training.run_folder import RunFolder

from .forked import run_ranks
from .tiny_runs import assert_identical, outcome


class PreemptedTask(LanguageTask):
    """Sends SIGTERM to the process that trains on a certain sequence, as a cluster would to one of its machines."""

    last: int

    def loss(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        if model.training and (batch == self.batch(self.last, 1)).all(1).any():
            os.kill(os.getpid(), signal.SIGTERM)
        return super().loss(model, batch)


def leg(path: Path, layout: dict[str, Any], last_step: int) -> str:
    """Continue the run in `path` until SIGTERM comes to one process in `last_step`, or to the end."""
    folder = RunFolder(path)
    config = folder.config()
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **layout))
    torch.Tensor.bfloat16 = torch.Tensor.float  # in this process alone; see `exact_muon`
    task = PreemptedTask(config.language, config.train.seed)
    task.last = last_step * config.train.batch_size - 1
    with joined(config.train) as processes:
        try:
            train(task, config, folder, quiet=True, processes=processes)
        except Interrupted as interrupted:
            return str(interrupted)
        return "finished"


@pytest.fixture
def exact_muon(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's Muon rounds to bf16 before it orthogonalises; then a sum in another order shows in every digit."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)


def plain_config(tiny: RunConfig, name: Any, num_steps: int = 10) -> RunConfig:
    """Without dropout, whose draws belong to the processes, and with a batch that 1, 2, 3 and 4 can share."""
    task = dataclasses.replace(tiny.language, model=dataclasses.replace(tiny.language.model, dropout=0.0))
    settings: dict[str, Any] = {"batch_size": 12, "num_accumulation_steps": 1, "num_steps": num_steps}
    train_config = dataclasses.replace(tiny.train, **settings, checkpoint_every=100)
    optimizer = dataclasses.replace(tiny.optimizer, name=name, lr=0.01)
    return dataclasses.replace(tiny, task=task, optimizer=optimizer, train=train_config)


LEGS: list[tuple[int, dict[str, Any], int]] = [
    (2, {"parallel": "ddp"}, 2),
    (4, {"parallel": "fsdp"}, 4),
    (2, {"parallel": "tp"}, 5),
    (3, {"parallel": "fsdp"}, 7),
    (1, {}, 99),
]


@pytest.mark.usefixtures("exact_muon")
@pytest.mark.parametrize("name", ["mars-adamw", "muon"])
def test_every_change_of_processes_continues_the_trajectory(tmp_path: Path, tiny: RunConfig, name: str) -> None:
    config = plain_config(tiny, name)
    task, straight = launch.start(config, tmp_path, "straight", numbered=False)
    train(task, config, straight, quiet=True)
    folder = run_folder.create(tmp_path, "moved", config, numbered=False)
    for size, layout, last in LEGS:
        answers = run_ranks(leg, size, folder.path, layout, last)
        expected = "finished" if last == 99 else f"stopped after step {last} and saved"
        assert answers == [expected] * size, "one process is asked to stop, and all do, after the same step"
    (state, rows), (wanted, wanted_rows) = outcome(folder.path), outcome(straight.path)
    for row, expected_row in zip(rows, wanted_rows, strict=True):
        # float32, summed in another order by each number of processes, and grown over ten steps
        assert row == pytest.approx(expected_row, rel=1e-4)
    for key in ("step", "schedulers", "next_sequence", "data", "tied"):
        assert state[key] == wanted[key]
    for key, value in wanted["model"].items():
        torch.testing.assert_close(state["model"][key], value, rtol=0, atol=2e-3)
    for part, wanted_part in zip(state["optimizer"], wanted["optimizer"], strict=True):
        assert part["state"].keys() == wanted_part["state"].keys()
        for index, entries in wanted_part["state"].items():
            assert part["state"][index].keys() == entries.keys()
            assert part["state"][index].get("step") == entries.get("step")


def test_the_same_processes_continue_bit_for_bit(tmp_path: Path, tiny: RunConfig) -> None:
    """With dropout: the random generators of each process continue, too."""
    optimizer = dataclasses.replace(tiny.optimizer, name="mars-adamw")
    sharded = dataclasses.replace(tiny.train, num_steps=6, parallel="fsdp")
    config = dataclasses.replace(tiny, train=sharded, optimizer=optimizer)
    straight, stopped = (run_folder.create(tmp_path, name, config, numbered=False) for name in ("straight", "stopped"))
    run_ranks(leg, 2, straight.path, {}, 99)
    # Accumulating, step 3 ends with sequence 11; the task counts batches of 2.
    assert run_ranks(leg, 2, stopped.path, {}, 6) == ["stopped after step 3 and saved"] * 2
    run_ranks(leg, 2, stopped.path, {}, 99)
    assert_identical(outcome(stopped.path), outcome(straight.path))
    states = outcome(straight.path)[0]["random"]
    assert len(states) == 2
    assert not torch.equal(states[0]["torch"], states[1]["torch"]), "each process drops other entries"


def test_all_processes_agree_on_the_newest_good_checkpoint(tmp_path: Path, tiny: RunConfig) -> None:
    config = dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, num_steps=8, checkpoint_every=2))
    folder = run_folder.create(tmp_path, "run", config, numbered=False)
    run_ranks(leg, 2, folder.path, {}, 99)
    expected = outcome(folder.path)
    (folder.path / "summary.json").unlink()
    damaged = folder.checkpoints / "step-00000008" / "__1_0.distcp"  # the second process finds it, the first must know
    data = bytearray(damaged.read_bytes())
    data[len(data) // 3] ^= 16
    damaged.write_bytes(data)
    run_ranks(leg, 2, folder.path, {}, 99)
    assert_identical(outcome(folder.path), expected)


def finished_run(tiny: RunConfig, runs: Path, name: Any = "mars-adamw") -> RunFolder:
    config = plain_config(tiny, name, num_steps=4)
    task, folder = launch.start(config, runs, "run", numbered=False)
    train(task, config, folder, quiet=True)
    return folder


@pytest.mark.parametrize("name", ["mars-m", "muon"])
def test_plain_state_dicts_load_into_torch(tmp_path: Path, tiny: RunConfig, name: str) -> None:
    folder = finished_run(tiny, tmp_path, name)
    main(["export", str(tmp_path / "run.pt"), str(folder.path)])
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    config = folder.config()
    model = LanguageTask(config.language, 0).build_model()
    model.load_state_dict(state["model"])
    stepper = optimizers.build(model, config.optimizer, config.train)
    for part, saved in zip(stepper.parts, state["optimizer"], strict=True):
        part.load_state_dict(saved)
        assert_identical(part.state_dict()["state"], saved["state"])
    assert state["step"] == 4


def test_plain_state_dicts_come_back(tmp_path: Path, tiny: RunConfig) -> None:
    folder = finished_run(tiny, tmp_path)
    main(["export", str(tmp_path / "run.pt"), str(folder.path)])
    other = run_folder.create(tmp_path, "other", folder.config(), numbered=False)
    main(["import", str(tmp_path / "run.pt"), str(other.path)])
    assert_identical(plain.read_newest(other.checkpoints), plain.read_newest(folder.checkpoints))
    with pytest.raises(InputError, match="is not older than step 4"):
        plain.import_(tmp_path / "run.pt", other.checkpoints)
    (tmp_path / "junk.pt").write_bytes(b"junk")
    with pytest.raises(InputError, match=r"junk.pt is no file of torch.save"):
        plain.import_(tmp_path / "junk.pt", other.checkpoints)
    torch.save({"step": 9, "model": {}, "tied": {}}, tmp_path / "half.pt")
    with pytest.raises(InputError, match="has no 'optimizer'"):
        plain.import_(tmp_path / "half.pt", other.checkpoints)


def test_torchs_own_state_dict_functions_read_it(tmp_path: Path, tiny: RunConfig) -> None:
    """They make the state exist by a step with zero gradients and lr = 0, and must end with the same state."""
    folder = finished_run(tiny, tmp_path)
    config = folder.config()
    model = LanguageTask(config.language, 0).build_model()
    mars = optimizers.build(model, config.optimizer, config.train).parts[0]
    model_state, optimizer_state = get_state_dict(model, mars)
    path = folder.checkpoints / "step-00000004"
    state = {"model": model_state, "optimizer": optimizer_state}
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.load(state, storage_reader=FileSystemReader(path), planner=DefaultLoadPlanner(allow_partial_load=True))
    set_state_dict(
        model,
        mars,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],  # pyright: ignore[reportArgumentType]
    )
    expected = plain.read(path)
    assert_identical(mars.state_dict()["state"], expected["optimizer"][0]["state"])
    assert_identical(dict(model.state_dict()), expected["model"])
