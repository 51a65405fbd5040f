"""Training in float16: the scale of the loss, the steps it costs, and its place in checkpoints."""

import dataclasses
import math
import os
import signal
from collections.abc import Set
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from mars_lab.errors import DivergenceError
from mars_lab.report.rows import read_rows
from mars_lab.tasks.language import LanguageTask
from mars_lab.training import launch, run_folder
from mars_lab.training.checkpoint import plain
from mars_lab.training.config import RunConfig, TrainConfig
from mars_lab.training.interruption import Interrupted
from mars_lab.training.loop import train
from mars_lab.training.optimizers import build
from mars_lab.training.processes import joined
from mars_lab.training.run_folder import RunFolder
from mars_lab.training.scaling import LossScaling
from mars_optim.sharding import local

from .forked import run_ranks
from .tiny_runs import assert_identical, outcome

INITIAL = 2.0**16
"""GradScaler's."""


class OverflowingTask(LanguageTask):
    """In certain evaluations, counted from 1, the loss or its gradient is not finite; in one, SIGTERM comes."""

    def __init__(
        self, config: RunConfig, evaluations: Set[int], *, in_gradient: bool = True, last: int | None = None
    ) -> None:
        super().__init__(config.language, config.train.seed)
        self.evaluations, self.in_gradient, self.last, self.count = evaluations, in_gradient, last, 0

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        loss = super().loss(model, batch)
        if not model.training:
            return loss
        self.count += 1
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.count not in self.evaluations:
            return loss
        # The square root's slope at 0 is infinite, its value is not.
        return loss + (loss * 0).sqrt() if self.in_gradient else loss * math.inf


def half(tiny: RunConfig, name: Any = "mars-m", mode: Any = "approx", **train_changes: Any) -> RunConfig:
    """In fp16, without dropout and with a batch that processes can share."""
    task = dataclasses.replace(tiny.language, model=dataclasses.replace(tiny.language.model, dropout=0.0))
    changes = {"precision": "fp16", "batch_size": 4, "num_accumulation_steps": 1, **train_changes}
    optimizer = dataclasses.replace(tiny.optimizer, name=name, mode=mode, lr=0.01)
    return RunConfig(task, optimizer, dataclasses.replace(tiny.train, **changes))


def run(config: RunConfig, runs: Path, name: str, overflows: Set[int] = frozenset()) -> RunFolder:
    folder = run_folder.create(runs, name, config, numbered=False)
    train(OverflowingTask(config, overflows), config, folder, quiet=True)
    return folder


def column(folder: RunFolder, name: str) -> list[float]:
    return [row[name] for row in read_rows(folder.metrics) if name in row]


@pytest.mark.parametrize(
    ("name", "mode"),
    [("mars-m", "approx"), ("mars-adamw", "exact"), ("mars-lion", "approx"), ("adamw", "approx"), ("muon", "approx")],
)
def test_losses_are_close_to_those_in_fp32(tmp_path: Path, tiny: RunConfig, name: str, mode: str) -> None:
    config = half(tiny, name, mode, num_steps=30)
    full = dataclasses.replace(config, train=dataclasses.replace(config.train, precision="fp32"))
    folder, straight = run(config, tmp_path, "fp16"), run(full, tmp_path, "fp32")
    # 11 bits of precision in logits and gradients; Lion's signs, and Adam's first steps, turn on the smallest of them.
    assert column(folder, "loss") == pytest.approx(column(straight, "loss"), rel=2**-7)
    assert column(folder, "loss") != column(straight, "loss")
    assert column(folder, "grad_norm") == pytest.approx(column(straight, "grad_norm"), rel=0.05), "unscaled"
    assert set(column(folder, "loss_scale")) == {INITIAL}
    assert column(straight, "loss_scale") == []
    assert {value.dtype for value in outcome(folder.path)[0]["model"].values()} == {torch.float32}


def three_steps(config: RunConfig) -> tuple[list[Tensor], list[float | None]]:
    """Weights after three steps without autocast, and the gradients' norms."""
    task = LanguageTask(config.language, 0)
    torch.manual_seed(0)
    model = task.build_model()
    stepper = build(model, dataclasses.replace(config.optimizer, max_grad_norm=0.1), config.train)

    def backward() -> float:
        loss = task.loss(model, task.batch(0, 4))
        stepper.scaling.scale(loss).backward()
        return loss.item()

    norms = [stepper.step(backward, measure_norm=True)[1] for _ in range(3)]
    return [p.detach() for p in model.parameters()], norms


@pytest.mark.parametrize("name", ["adamw", "muon", "shampoo", "mars-shampoo"])
def test_a_power_of_two_changes_nothing_but_the_range(tiny: RunConfig, name: str) -> None:
    """In fp32 arithmetic a step with a scaled loss, clipped gradients included, is the step without, bit for bit."""
    full, scaled = (half(tiny, name, precision=precision) for precision in ("fp32", "fp16"))
    assert_identical(three_steps(scaled), three_steps(full))
    assert min(norm or 0 for norm in three_steps(full)[1]) > 0.1, "all are clipped"


# Exact mode evaluates twice a step, first at the previous weights.
@pytest.mark.parametrize(
    ("name", "mode", "evaluation"),
    [("mars-m", "approx", 6), ("mars-adamw", "exact", 11), ("mars-adamw", "exact", 12), ("muon", "approx", 6)],
)
@pytest.mark.parametrize("in_gradient", [True, False])
def test_an_overflow_costs_one_step(
    tmp_path: Path, tiny: RunConfig, name: str, mode: str, evaluation: int, in_gradient: bool
) -> None:
    config = half(tiny, name, mode, num_steps=8, checkpoint_every=1, num_checkpoints=100)
    folder = run_folder.create(tmp_path, "run", config, numbered=False)
    train(OverflowingTask(config, {evaluation}, in_gradient=in_gradient), config, folder, quiet=True)
    assert column(folder, "skipped") == [0.0] * 5 + [1.0] + [0.0] * 2
    assert column(folder, "loss_scale") == [INITIAL] * 6 + [INITIAL / 2] * 2
    before, after = (plain.read(folder.checkpoints / f"step-0000000{step}") for step in (5, 6))
    assert_identical(after["model"], before["model"])
    assert_identical([part["state"] for part in after["optimizer"]], [part["state"] for part in before["optimizer"]])
    assert after["step"] == 6
    assert [schedule["last_epoch"] for schedule in after["schedulers"]] == [6] * len(after["schedulers"])
    assert all(math.isfinite(value) for row in read_rows(folder.metrics) for value in row.values())


def test_a_scale_that_is_too_large_comes_down(tmp_path: Path, tiny: RunConfig) -> None:
    """Here float16 itself overflows."""
    folder = run(half(tiny, num_steps=1), tmp_path, "run")
    state = plain.read_newest(folder.checkpoints)
    assert state is not None
    longer = half(tiny, num_steps=40)
    state["scaler"]["scale"] = 2.0**40
    other = run_folder.create(tmp_path, "other", longer, numbered=False)
    torch.save(state, tmp_path / "state.pt")
    plain.import_(tmp_path / "state.pt", other.checkpoints)
    launch.resume(other, quiet=True)
    skipped, scales = column(other, "skipped"), column(other, "loss_scale")
    assert scales[0] == 2.0**40
    assert all(after == scale / (1 + skip) for scale, skip, after in zip(scales, skipped, scales[1:], strict=False))
    assert skipped[:15] == [1.0] * 15, "2^25 times gradients that are not all below 2^-9"
    assert sum(skipped) < 30
    assert column(other, "loss")[-1] < column(other, "loss")[0]


@pytest.mark.parametrize("in_gradient", [True, False])
def test_an_overflow_at_every_scale_ends_the_run(tmp_path: Path, tiny: RunConfig, in_gradient: bool) -> None:
    config = half(tiny, num_steps=40)
    folder = run_folder.create(tmp_path, "run", config, numbered=False)
    task = OverflowingTask(config, set(range(8, 100)), in_gradient=in_gradient)
    with pytest.raises(
        DivergenceError,
        match=r"float16 overflows whatever the scale of the loss, which has fallen below 1 at step 24; "
        r"the last good checkpoint is .*step-00000020. Try --train.precision bf16 or fp32, a lower --optimizer.lr",
    ):
        train(task, config, folder, quiet=True)


@pytest.mark.parametrize("mode", ["approx", "exact"])
def test_a_killed_run_continues_bit_for_bit(tmp_path: Path, tiny: RunConfig, mode: str) -> None:
    """With overflows before and after the checkpoint, and one in the step before it."""
    config = half(tiny, "mars-adamw", mode, num_steps=12, checkpoint_every=4)
    config = dataclasses.replace(config, task=tiny.task)  # with dropout
    per_step = 2 if mode == "exact" else 1
    overflows = {step * per_step for step in (2, 4, 7)}
    straight = run(config, tmp_path, "straight", overflows)
    folder = run_folder.create(tmp_path, "stopped", config, numbered=False)

    class PowerCutError(Exception): ...

    class Killed(OverflowingTask):
        def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
            if self.count == 5 * per_step + 1:
                raise PowerCutError
            return super().loss(model, batch)

    with pytest.raises(PowerCutError):
        train(Killed(config, overflows), config, folder, quiet=True)
    rest = {evaluation - 4 * per_step for evaluation in overflows}
    train(OverflowingTask(config, rest), config, folder, quiet=True)
    assert_identical(outcome(folder.path), outcome(straight.path))
    assert outcome(folder.path)[0]["scaler"]["scale"] == INITIAL / 8
    assert outcome(folder.path)[0]["scaler"]["_growth_tracker"] == 12 - 7


def test_a_checkpoint_without_a_scale(tmp_path: Path, tiny: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    full = half(tiny, num_steps=4, precision="fp32")
    run(full, tmp_path, "full")
    state = plain.read_newest(tmp_path / "full" / "checkpoints")
    torch.save(state, tmp_path / "full.pt")
    other = run_folder.create(tmp_path, "half", half(tiny, num_steps=6), numbered=False)
    plain.import_(tmp_path / "full.pt", other.checkpoints)
    launch.resume(other, quiet=True)
    assert "step-00000004 is not of a run in fp16; the scale of the loss begins anew" in capsys.readouterr().err
    assert column(other, "loss_scale") == [INITIAL] * 2
    # The other way there is nothing to say.
    back = run_folder.create(tmp_path, "back", half(tiny, num_steps=8, precision="fp32"), numbered=False)
    torch.save(plain.read_newest(other.checkpoints), tmp_path / "half.pt")
    plain.import_(tmp_path / "half.pt", back.checkpoints)
    launch.resume(back, quiet=True)
    assert capsys.readouterr().err == ""


def scaled(overflowing: int | None) -> list[Any]:
    """The verdict on gradients one of which is infinite on one process, and what is left of the others."""
    with joined(TrainConfig(device="cpu", batch_size=2)):
        mesh = init_device_mesh("cpu", (2,))
        whole = nn.Parameter(torch.ones(3))
        sharded = nn.Parameter(distribute_tensor(torch.ones(3, 2), mesh, [Shard(0)]))
        scaling = LossScaling([whole, sharded], enabled=True)
        scale = scaling.scale(torch.ones(()))
        whole.grad, sharded.grad = whole.detach() * scale, sharded.detach() * scale
        if dist.get_rank() == overflowing:
            local(sharded.grad)[0, 0] = math.inf
        scaling.unscale_(1.0)
        verdict = scaling.has_overflowed
        scaling.finish_step()
        return [verdict, scaling.state_dict()["scale"], whole.grad.tolist()]


@pytest.mark.parametrize(("overflowing", "scale"), [(None, INITIAL), (0, INITIAL / 2), (1, INITIAL / 2)])
def test_processes_agree_on_whole_and_sharded_gradients(overflowing: int | None, scale: float) -> None:
    answers = run_ranks(scaled, 2, overflowing)
    assert answers[0] == answers[1] == [overflowing is not None, scale, [1.0, 1.0, 1.0]]


def leg(path: Path, layout: dict[str, Any], last: int | None, overflows: dict[int, set[int]]) -> str:
    """Continue the run in `path` for `last` steps, or to the end; some steps overflow on some ranks."""
    folder = RunFolder(path)
    config = folder.config()
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **layout))
    with joined(config.train) as processes:
        task = OverflowingTask(config, overflows.get(processes.ranks.rank, set()), in_gradient=False, last=last)
        try:
            train(task, config, folder, quiet=True, processes=processes)
        except Interrupted as interrupted:
            return str(interrupted)
        return "finished"


def test_processes_skip_together_and_pass_the_scale_on(tmp_path: Path, tiny: RunConfig) -> None:
    """The overflow is one process's, and the layout changes."""
    config = half(tiny, "mars-adamw", num_steps=11, checkpoint_every=100)
    straight = run(config, tmp_path, "straight", {2, 5, 7})
    folder = run_folder.create(tmp_path, "moved", config, numbered=False)
    assert run_ranks(leg, 2, folder.path, {"parallel": "ddp"}, 3, {1: {2}}) == ["stopped after step 3 and saved"] * 2
    assert run_ranks(leg, 2, folder.path, {"parallel": "fsdp"}, 3, {0: {2}}) == ["stopped after step 6 and saved"] * 2
    assert run_ranks(leg, 2, folder.path, {"parallel": "tp"}, 2, {1: {1}}) == ["stopped after step 8 and saved"] * 2
    assert leg(folder.path, {}, None, {}) == "finished"
    assert column(folder, "skipped") == [float(step in (2, 5, 7)) for step in range(1, 12)]
    for name in ("skipped", "loss_scale", "lr"):
        assert column(folder, name) == column(straight, name)
    assert outcome(folder.path)[0]["scaler"] == outcome(straight.path)[0]["scaler"]
    losses = column(straight, "loss")
    # 11 bits, and sums in another order.
    assert column(folder, "loss") == pytest.approx([losses[i] for i in (0, 2, 3, 5, 7, 8, 9, 10)], rel=2**-7)


@pytest.mark.parametrize(
    ("parallel", "size", "changes"),
    [
        ("ddp", 2, {"name": "mars-m", "shard_state": True}),
        ("fsdp", 2, {"name": "muon"}),
        ("hsdp", 4, {"name": "mars-adamw", "mode": "exact"}),
        ("fsdp", 3, {"name": "adamw"}),
    ],
)
def test_layouts_train_as_one_process_does(
    tmp_path: Path, tiny: RunConfig, parallel: Any, size: int, changes: dict[str, Any]
) -> None:
    config = half(tiny, num_steps=10, batch_size=12, parallel=parallel, group_size=2)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **changes))
    alone = dataclasses.replace(config.optimizer, shard_state=False)
    straight = run(dataclasses.replace(config, optimizer=alone), tmp_path, "straight")
    many = run_folder.create(tmp_path, "many", config, numbered=False)
    # On one process only, and not the one that writes.
    assert run_ranks(leg, size, many.path, {}, None, {1: {4}}) == ["finished"] * size
    num_evaluations = 2 if config.optimizer.mode == "exact" else 1
    skipped = 4 // num_evaluations
    assert column(many, "skipped") == [float(step == skipped) for step in range(1, 11)]
    assert column(many, "loss_scale") == [INITIAL] * skipped + [INITIAL / 2] * (10 - skipped)
    assert column(many, "grad_norm") == pytest.approx(column(straight, "grad_norm"), rel=0.1)
