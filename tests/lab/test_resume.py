"""A run that was stopped and continued is the run that never stopped, bit for bit."""

import dataclasses
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mars_lab.errors import InputError
from mars_lab.report.rows import read_rows
from mars_lab.tasks.language import LanguageTask
from mars_lab.training import launch, run_folder
from mars_lab.training.config import RunConfig
from mars_lab.training.interruption import Interrupted
from mars_lab.training.loop import train
from mars_lab.training.run_folder import RunFolder

from .tiny_runs import assert_identical, flags, outcome, start_mars


class PowerCutError(Exception):
    """Stands for the process's sudden end."""


class FragileTask(LanguageTask):
    """Ends the process, or sends a signal to it, when the batch of a certain step is at hand."""

    def __init__(self, config: RunConfig, first_sequence: int, signal_number: int | None = None) -> None:
        super().__init__(config.language, config.train.seed)
        self.first_sequence, self.signal_number = first_sequence, signal_number

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        if model.training and torch.equal(batch, self.batch(self.first_sequence, len(batch))):
            if self.signal_number is None:
                raise PowerCutError
            os.kill(os.getpid(), self.signal_number)
        return super().loss(model, batch)


def with_optimizer(config: RunConfig, name: Any, mode: Any = "approx") -> RunConfig:
    changes = {"name": name, "mode": mode, "shampoo_interval": 4}  # between checkpoints, so that old roots are in them
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **changes))


def run_uninterrupted(config: RunConfig, runs: Path) -> Path:
    task, folder = launch.start(config, runs, "straight", numbered=False)
    train(task, config, folder, quiet=True)
    return folder.path


def begin(config: RunConfig, runs: Path) -> RunFolder:
    return run_folder.create(runs, "stopped", config, numbered=False)


def disturb_generators() -> None:
    """Whatever a new process's generators happen to hold must not matter."""
    torch.manual_seed(999)
    random.seed(999)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("mars-m", "approx"),
        ("mars-adamw", "exact"),
        ("mars-m", "exact"),
        ("muon", "approx"),
        ("shampoo", "approx"),
        ("adamw", "approx"),
    ],
)
def test_after_a_power_cut(tmp_path: Path, tiny: RunConfig, name: str, mode: str) -> None:
    config = with_optimizer(tiny, name, mode)
    straight = run_uninterrupted(config, tmp_path)
    folder = begin(config, tmp_path)
    # Steps 3 (before any checkpoint), 6 (just after one), 9 (between two, second half of an accumulated batch).
    for sequence in (2 * 4, 5 * 4, 8 * 4 + 2):
        with pytest.raises(PowerCutError):
            train(FragileTask(config, sequence), config, folder, quiet=True)
        disturb_generators()
    launch.resume(folder, quiet=True)
    assert_identical(outcome(folder.path), outcome(straight))
    assert (folder.path / "sample.txt").read_text() == (straight / "sample.txt").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [0, 4, 7])
def test_after_a_signal(tmp_path: Path, tiny: RunConfig, step: int, number: signal.Signals) -> None:
    straight = run_uninterrupted(tiny, tmp_path)
    folder = begin(tiny, tmp_path)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted, match=rf"stopped after step {step + 1} and saved") as stopped:
        train(FragileTask(tiny, step * 4, number), tiny, folder, quiet=True)
    assert stopped.value.exit_code == 128 + number
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert outcome(folder.path)[0]["step"] == step + 1, "the step under way is finished and saved"
    disturb_generators()
    launch.resume(folder, quiet=True)
    assert_identical(outcome(folder.path), outcome(straight))


def test_a_signal_in_the_last_step_does_not_lose_the_results(tmp_path: Path, tiny: RunConfig) -> None:
    folder = begin(tiny, tmp_path)
    train(FragileTask(tiny, 11 * 4, signal.SIGINT), tiny, folder, quiet=True)
    assert folder.summary() is not None


def test_after_damage_to_the_newest_checkpoint(tmp_path: Path, tiny: RunConfig) -> None:
    straight = run_uninterrupted(tiny, tmp_path)
    folder = begin(tiny, tmp_path)
    with pytest.raises(PowerCutError):
        train(FragileTask(tiny, 11 * 4), tiny, folder, quiet=True)
    damaged = folder.checkpoints / "step-00000010" / "__0_0.distcp"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    launch.resume(folder, quiet=True)
    assert_identical(outcome(folder.path), outcome(straight))


def test_half_a_line_of_metrics_is_written_again(tmp_path: Path, tiny: RunConfig) -> None:
    straight = run_uninterrupted(tiny, tmp_path)
    folder = begin(tiny, tmp_path)
    with pytest.raises(PowerCutError):
        train(FragileTask(tiny, 8 * 4), tiny, folder, quiet=True)
    text = folder.metrics.read_text()
    folder.metrics.write_text(text + '{"step": 9, "lo')
    launch.resume(folder, quiet=True)
    assert_identical(outcome(folder.path), outcome(straight))


def test_changed_data_is_refused(tmp_path: Path, tiny: RunConfig) -> None:
    corpus = tmp_path / "text.jsonl"
    corpus.write_text(Path(tiny.language.data.corpus).read_text())
    data = dataclasses.replace(tiny.language.data, corpus=str(corpus))
    config = dataclasses.replace(tiny, task=dataclasses.replace(tiny.language, data=data))
    folder = begin(config, tmp_path)
    with pytest.raises(PowerCutError):
        train(FragileTask(config, 8 * 4), config, folder, quiet=True)
    corpus.write_text(corpus.read_text() * 2)
    with pytest.raises(InputError, match=r"the data of .*stopped changed since the run began"):
        launch.resume(folder, quiet=True)


def test_two_processes_cannot_train_one_run(tmp_path: Path, tiny: RunConfig) -> None:
    folder = begin(tiny, tmp_path)
    with folder.locked(), pytest.raises(InputError, match=r"another process is training in .*stopped"):
        launch.resume(folder, quiet=True)


def wait_for_step(folder: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (folder / "metrics.jsonl").exists() and f'"step": {step}, ' in (folder / "metrics.jsonl").read_text():
            return
        time.sleep(0.005)
    raise AssertionError(f"{folder} did not reach step {step}")


def test_real_processes_killed_and_stopped(tmp_path: Path, tiny: RunConfig) -> None:
    """Through the command: kill -9 twice at random moments, Ctrl-C, SIGTERM, and on to the end."""
    long = dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, num_steps=300, checkpoint_every=7))
    straight = run_uninterrupted(long, tmp_path)
    first = ("train", *flags(long), "--name", "stopped", "--runs", str(tmp_path))
    again = ("train", "--resume", "--runs", str(tmp_path))
    chance = random.Random(time.time_ns())
    arguments = first
    for number in (signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM):
        # Beyond what the process before has written, so that the new one has certainly begun to train.
        recorded = max((row["step"] for row in read_rows(tmp_path / "stopped" / "metrics.jsonl")), default=0)
        process = start_mars(*arguments, cwd=tmp_path)
        wait_for_step(tmp_path / "stopped", recorded + chance.randint(8, 30))
        time.sleep(chance.uniform(0, 0.02))
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        arguments = again
        if number == signal.SIGKILL:
            assert process.returncode == -signal.SIGKILL, output
        else:
            assert process.returncode == 128 + number, output
            assert f"Continue with: mars train --resume {tmp_path / 'stopped'}" in output
    process = start_mars(*again, cwd=tmp_path)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert_identical(outcome(tmp_path / "stopped"), outcome(straight))
