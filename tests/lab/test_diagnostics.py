"""What the diagnostics say, against the same from its definition."""

import dataclasses
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mars_lab.report.rows import read_rows
from mars_lab.training import launch
from mars_lab.training.config import OptimizerConfig, RunConfig, TrainConfig
from mars_lab.training.diagnostics import Diagnostics
from mars_lab.training.loop import train
from mars_lab.training.optimizers import build
from mars_optim import MARS


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def followed(optimizer: OptimizerConfig, num_steps: int) -> tuple[dict[str, float], list[dict[str, Tensor]], Net, Any]:
    """The measures of the last of `num_steps` steps and the gradients of them all."""
    model = Net()
    stepper = build(model, optimizer, TrainConfig(num_steps=20, precision="fp32", warmup_fraction=0.0))
    diagnostics = Diagnostics(stepper.parts, model.named_parameters(), sequences_per_step=32)
    gradients: list[dict[str, Tensor]] = []
    measures: dict[str, float] = {}
    for step in range(num_steps):

        def backward(step: int = step) -> float:
            x = torch.randn(32, 5, generator=torch.Generator().manual_seed(step))
            loss = (model(x) - x[:, :3]).square().mean() * 40
            loss.backward()
            return loss.item()

        if step == num_steps - 1:
            diagnostics.arm()
            before = {n: p.detach().clone() for n, p in model.named_parameters()}
        stepper.step(lambda backward=backward: record(backward, model, gradients), measure_norm=False)
    measures = diagnostics.collect(tokens=100, seconds=1.0)
    return measures, gradients, model, before  # pyright: ignore[reportPossiblyUnboundVariable]


def record(backward: Any, model: Net, gradients: list[dict[str, Tensor]]) -> float:
    loss = backward()
    gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    return loss


def flat(gradients: dict[str, Tensor], only: str = "weight") -> Tensor:
    return torch.cat([g.flatten() for n, g in gradients.items() if only in n])


@pytest.mark.parametrize("max_grad_norm", [None, 3.0])
@pytest.mark.parametrize("clip_norm", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("precision", ["fp32", "8bit"])
def test_the_clip_rate_is_that_of_the_corrected_gradients(
    max_grad_norm: float | None, clip_norm: float, precision: Any
) -> None:
    config = OptimizerConfig(
        "mars-adamw", lr=1e-3, clip_norm=clip_norm, max_grad_norm=max_grad_norm, gamma=0.05, state_precision=precision
    )
    measures, gradients, *_ = followed(config, 3)
    scales = []
    for g in gradients[-2:]:
        norm = torch.cat([value.flatten() for value in g.values()]).norm()
        scales.append(1.0 if max_grad_norm is None else min(1.0, max_grad_norm / (norm + 1e-6)))
    kappa, exceeding = 0.05 * 0.95 / 0.05, []
    for name in ("first.weight", "second.weight"):
        g, previous = scales[1] * gradients[-1][name], scales[0] * gradients[-2][name]
        corrected = g + kappa * (g - previous)
        assert not math.isclose(corrected.norm(), clip_norm, rel_tol=0.02), "too near to tell"
        exceeding.append(corrected.norm() > clip_norm)
    assert measures["clip_rate"] == sum(exceeding) / 2


def test_momentum_noise_and_updates_are_as_defined() -> None:
    measures, gradients, model, before = followed(OptimizerConfig("mars-adamw", lr=1e-3, max_grad_norm=None), 6)
    g, previous = flat(gradients[-1]), flat(gradients[-2])
    noise = 32 * ((g @ g + previous @ previous) / (2 * g @ previous) - 1)
    assert measures["noise_scale"] == pytest.approx(noise.item(), rel=1e-4)
    assert -1 <= measures["grad_momentum_cosine"] <= 1
    for label, names in (
        ("first.weight+1", ["first.weight", "second.weight"]),
        ("first.bias+1", ["first.bias", "second.bias"]),
    ):
        now = dict(model.named_parameters())
        change = torch.cat([(now[n] - before[n]).flatten() for n in names]).norm()
        weight = torch.cat([before[n].flatten() for n in names]).norm()
        assert measures[f"update_ratio/{label}"] == pytest.approx((change / weight).item(), rel=1e-4)


def test_torchs_optimizers_are_followed_too() -> None:
    measures, gradients, *_ = followed(OptimizerConfig("adamw", lr=1e-3, betas=(0.9, 0.95), max_grad_norm=None), 4)
    momentum = torch.zeros(())
    for gradient in gradients[:-1]:
        momentum = 0.9 * momentum + 0.1 * flat(gradient, "")
    g = flat(gradients[-1], "")
    assert measures["momentum_norm"] == pytest.approx(momentum.norm().item(), rel=1e-5)
    cosine = g @ momentum / (g.norm() * momentum.norm())
    assert measures["grad_momentum_cosine"] == pytest.approx(cosine.item(), rel=1e-4)
    assert "clip_rate" not in measures
    assert "momentum_norm" in followed(OptimizerConfig("muon", lr=1e-3), 3)[0]


def test_the_noise_scale_is_that_of_the_noise() -> None:
    """Gradients G + n with known |G|^2 = 4 and tr(Sigma) = 12 for one sequence, batches of 8."""
    weight = nn.Parameter(torch.zeros(400))
    mars = MARS([weight], lr=0.0, optimize_1d=True)
    diagnostics = Diagnostics([mars], [("w", weight)], sequences_per_step=8)
    generator, scales = torch.Generator().manual_seed(0), []
    for _ in range(600):
        diagnostics.arm()
        weight.grad = torch.full((400,), 0.1) + torch.randn(400, generator=generator) * math.sqrt(12 / 8 / 400)
        mars.step()
        scales.append(diagnostics.collect(tokens=0, seconds=0.0).get("noise_scale", math.nan))
    assert math.isnan(scales[0]), "the first step has no previous gradient"
    mean = torch.tensor(scales[1:]).mean().item()
    assert mean == pytest.approx(3.0, rel=0.05)


def test_large_tensors_are_sampled_evenly() -> None:
    weight = nn.Parameter(torch.ones(400_000))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    diagnostics = Diagnostics([optimizer], [("w", weight)], sequences_per_step=1)
    diagnostics.arm()
    weight.grad = torch.linspace(0, 1, 400_000)
    optimizer.step()
    ratio = diagnostics.collect(tokens=0, seconds=0.0)["update_ratio/w"]
    assert ratio == pytest.approx(math.sqrt(1 / 3), rel=1e-3)


def test_a_run_records_them(tmp_path: Path, tiny: RunConfig) -> None:
    config = dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, num_steps=40))
    task, folder = launch.start(config, tmp_path, "run", numbered=False)
    train(task, config, folder, quiet=True)
    rows = [row for row in read_rows(folder.metrics) if "clip_rate" in row]
    assert [row["step"] for row in rows] == [10, 20, 30, 40]
    assert all(
        {"grad_norm", "noise_scale", "momentum_norm", "memory_mib"} <= set(row) or "noise_scale" not in row
        for row in rows
    )
    assert all(row["tokens_per_second"] > 0 for row in rows[1:])
    assert all(0 <= row["clip_rate"] <= 1 for row in rows)
    labels = {key for key in rows[0] if key.startswith("update_ratio/")}
    assert len(labels) == 4
    assert all(0 < row[label] < 1 for row in rows for label in labels)
    assert all(later["tokens"] > row["tokens"] for row, later in pairwise(rows))


def _sharded(rank: int, store: str, layout: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model, options = Net(), {}
    if layout == "weights":
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    else:
        options = {"process_group": dist.group.WORLD, "shard_state": True}
    results[rank] = measured(model, **options)
    dist.destroy_process_group()


def measured(model: nn.Module, **options: Any) -> dict[str, float]:
    """Measures of the third step on the same data everywhere; MARS-AdamW of this is the same sharded or not."""
    optimizer = MARS(model.parameters(), lr=1e-2, clip_norm=2.0, gamma=0.05, **options)
    diagnostics = Diagnostics(
        [optimizer], model.named_parameters(), sequences_per_step=32, state_is_shared_out=bool(options)
    )
    for step in range(3):
        x = torch.randn(32, 5, generator=torch.Generator().manual_seed(step))
        ((model(x) - x[:, :3]).square().mean() * 40).backward()
        if step == 2:
            diagnostics.arm()
        optimizer.step()
        optimizer.zero_grad()
    measures = diagnostics.collect(tokens=0, seconds=0.0)
    del measures["memory_mib"]
    return measures


@pytest.mark.parametrize("layout", ["weights", "state"])
def test_sharded_tensors_are_measured_whole(tmp_path: Path, layout: str) -> None:
    context = torch.multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        arguments = str(tmp_path / "store"), layout, results
        processes = [context.Process(target=_sharded, args=(rank, *arguments)) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=120)
            assert process.exitcode == 0
        measures = dict(results)
    assert measures[0] == measures[1]
    assert measures[0] == pytest.approx(measured(Net()), rel=1e-4)
