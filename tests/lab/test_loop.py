import dataclasses
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F

from mars_lab.data.tokens import DataConfig
from mars_lab.errors import InputError, TrainingError
from mars_lab.models.gpt2 import GPT2
from mars_lab.ranks import Ranks
from mars_lab.report.rows import read_rows
from mars_lab.tasks.language import LanguageTask
from mars_lab.training import launch
from mars_lab.training.config import OptimizerConfig, RunConfig, TrainConfig, from_dict
from mars_lab.training.loop import train
from mars_lab.training.run_folder import RunFolder

from .tiny_runs import outcome


def run(config: RunConfig, runs: Path, name: str = "run") -> RunFolder:
    task, folder = launch.start(config, runs, name, numbered=False)
    train(task, config, folder, quiet=True)
    return folder


def test_a_run_leaves_what_it_promises(tmp_path: Path, tiny: RunConfig) -> None:
    folder = run(tiny, tmp_path)
    assert {path.name for path in folder.path.iterdir() if not path.name.startswith(".")} == {
        "config.json", "metrics.jsonl", "checkpoints", "tensorboard", "loss.png", "loss.svg", "groups.txt",
        "sample.txt", "summary.json",
    }  # fmt: skip
    assert folder.config() == tiny
    rows = read_rows(folder.metrics)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13))
    assert [row["step"] for row in rows if "val_loss" in row] == [0, 4, 8, 12]
    assert [row["step"] for row in rows if "grad_norm" in row] == [10]
    assert rows[-1]["tokens"] == 12 * 2 * 2 * 16
    assert all(later["seconds"] >= row["seconds"] for row, later in pairwise(rows))
    summary = folder.summary()
    assert summary is not None
    assert summary["val_loss"] == rows[-1]["val_loss"]
    assert summary["parameters"] == sum(p.numel() for p in GPT2(tiny.language.model).parameters())
    assert (folder.path / "sample.txt").read_text().startswith("My fellow citizens,")
    assert (folder.path / "loss.png").read_bytes().startswith(b"\x89PNG")
    board = EventAccumulator(str(folder.tensorboard)).Reload()
    assert [event.step for event in board.Scalars("loss")] == list(range(1, 13))
    assert board.Scalars("val_loss")[-1].value == pytest.approx(summary["val_loss"])


def test_training_learns(tmp_path: Path, tiny: RunConfig) -> None:
    config = dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, num_steps=60))
    rows = [row for row in read_rows(run(config, tmp_path).metrics) if "val_loss" in row]
    assert rows[0]["val_loss"] == pytest.approx(math.log(300), abs=0.1)
    assert rows[-1]["val_loss"] < 4.0


def test_accumulated_batches_are_one_large_batch(tmp_path: Path, tiny: RunConfig) -> None:
    model = dataclasses.replace(tiny.language.model, dropout=0.0)
    config = dataclasses.replace(tiny, task=dataclasses.replace(tiny.language, model=model))
    losses = []
    for size, count in ((8, 1), (2, 4)):
        part = dataclasses.replace(tiny.train, batch_size=size, num_accumulation_steps=count)
        folder = run(dataclasses.replace(config, train=part), tmp_path, f"{size}x{count}")
        losses.append(torch.tensor([row["loss"] for row in read_rows(folder.metrics) if "loss" in row]))
    # Float32 carries 7 digits, and 12 steps let a difference in the last one grow a little.
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)


def test_the_validation_loss_is_the_mean_over_all_tokens(tiny: RunConfig) -> None:
    task = LanguageTask(dataclasses.replace(tiny.language, eval_sequences=0, eval_batch_size=4), seed=0)
    model = task.build_model()
    measured = task.evaluate(model, Ranks())["val_loss"]
    assert model.training
    tokens = torch.from_numpy(task.data.val[:].astype("int64"))
    count = (len(tokens) - 1) // 16
    assert count % 4, "the last batch should be smaller than the others"
    inputs, targets = tokens[: count * 16].view(count, 16), tokens[1 : count * 16 + 1]
    model.eval()
    assert measured == pytest.approx(F.cross_entropy(model(inputs).flatten(0, 1), targets).item(), rel=1e-5)


def test_the_seed_decides_everything(tmp_path: Path, tiny: RunConfig) -> None:
    other = dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, seed=1))
    first, second, third = (run(c, tmp_path, n) for n, c in (("a", tiny), ("b", tiny), ("c", other)))
    assert outcome(first.path)[1] == outcome(second.path)[1]
    assert outcome(first.path)[1] != outcome(third.path)[1]


class BrokenTask(LanguageTask):
    """Loss or gradients that stop being finite at a certain batch."""

    def __init__(self, config: RunConfig, at_batch: int, *, in_gradient: bool = False) -> None:
        super().__init__(config.language, config.train.seed)
        self.left, self.in_gradient = at_batch, in_gradient

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        loss = super().loss(model, batch)
        if not model.training:
            return loss
        self.left -= 1
        if self.left != 0:
            return loss
        # The square root's slope at 0 is infinite, its value is not.
        return loss + (loss * 0).sqrt() if self.in_gradient else loss * math.nan


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, tiny: RunConfig) -> None:
    _, folder = launch.start(tiny, tmp_path, "run", numbered=False)
    with pytest.raises(TrainingError, match=r"the loss is nan at step 8; the last good .*step-00000005.*lower --opt"):
        train(BrokenTask(tiny, 16), tiny, folder, quiet=True)
    launch.resume(folder, quiet=True)
    assert folder.summary() is not None


def test_weights_that_are_not_finite_never_become_a_checkpoint(tmp_path: Path, tiny: RunConfig) -> None:
    _, folder = launch.start(tiny, tmp_path, "run", numbered=False)
    with pytest.raises(TrainingError, match=r"the weight .* is not finite after step 10; .*step-00000005"):
        train(BrokenTask(tiny, 20, in_gradient=True), tiny, folder, quiet=True)
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step-00000005"]


def test_a_failure_before_the_first_checkpoint_says_so(tmp_path: Path, tiny: RunConfig) -> None:
    _, folder = launch.start(tiny, tmp_path, "run", numbered=False)
    with pytest.raises(TrainingError, match=r"at step 1; the last good checkpoint is none, it failed before"):
        train(BrokenTask(tiny, 1), tiny, folder, quiet=True)


def test_bf16_trains_close_to_fp32_and_keeps_fp32_weights(tmp_path: Path, tiny: RunConfig) -> None:
    half = dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, precision="bf16"))
    task, folder = launch.start(half, tmp_path, "half", numbered=False)
    losses = [train(task, half, folder, quiet=True)["val_loss"], run(tiny, tmp_path).summary()]
    assert losses[1] is not None
    # bf16 has 8 bits of precision: a relative error of 2^-8 in the logits moves the loss by no more than that.
    assert losses[0] == pytest.approx(losses[1]["val_loss"], rel=2**-6)
    assert losses[0] != losses[1]["val_loss"]
    assert {value.dtype for value in outcome(folder.path)[0]["model"].values()} == {torch.float32}


def test_a_folder_in_use_is_refused(tmp_path: Path, tiny: RunConfig) -> None:
    run(tiny, tmp_path, "run")
    with pytest.raises(InputError, match=r"run holds another run .* --name.*mars train --resume .*run"):
        launch.start(tiny, tmp_path, "run", numbered=False)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("mine")
    with pytest.raises(InputError, match="notes holds another run or other files"):
        launch.start(tiny, tmp_path, "notes", numbered=False)


def test_numbered_folders_take_the_first_free_number(tmp_path: Path, tiny: RunConfig) -> None:
    names = [launch.start(tiny, tmp_path, "mars-m", numbered=True)[1].path.name for _ in range(3)]
    assert names == ["mars-m-001", "mars-m-002", "mars-m-003"]


def test_bad_data_leaves_no_run_folder(tmp_path: Path, tiny: RunConfig) -> None:
    task = dataclasses.replace(tiny.language, data=DataConfig(str(tmp_path / "nothing")))
    with pytest.raises(InputError, match="no corpus at"):
        launch.start(dataclasses.replace(tiny, task=task), tmp_path / "runs", "run", numbered=False)
    assert not (tmp_path / "runs").exists()


def test_configurations_survive_json() -> None:
    config = RunConfig(optimizer=OptimizerConfig(lr_1d=0.5, clip_norm=None, betas=(0.1, 0.2)))
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    assert from_dict(RunConfig, values) == config
    values["optimizer"]["momentum"] = 0.9
    with pytest.raises(InputError, match=r"unknown configuration key optimizer.momentum; known: name, mode, lr"):
        from_dict(RunConfig, values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 0}, "train.num_steps must be at least 1, got 0"),
        ({"warmup_fraction": 1.5}, r"train.warmup_fraction must be in \[0, 1\], got 1.5"),
        ({"device": "toaster"}, "train.device must be auto, cpu or cuda, got 'toaster'"),
    ],
)
def test_bad_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainConfig(**change)


def test_auto_is_resolved_before_it_is_recorded() -> None:
    resolved = TrainConfig().resolved()
    assert resolved.device in ("cpu", "cuda")
    assert resolved.precision in ("fp32", "bf16")
    assert resolved == resolved.resolved()
