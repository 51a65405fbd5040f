"""What only a CUDA device can show. Without one, every test here is skipped; `make gpu` runs them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mars_optim import MARS, param_groups

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

TYPES = ["adamw", "lion", "shampoo", "m"]


def network(device: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8)).to(device, dtype)


def train(device: str, dtype: torch.dtype, num_steps: int, **options: Any) -> list[Tensor]:
    model = network(device, dtype)
    optimizer = MARS(model.parameters(), lr=1e-2, weight_decay=0.1, **options)
    generator = torch.Generator().manual_seed(1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    for _ in range(num_steps):
        x = torch.randn(64, 16, generator=generator, dtype=torch.float64).to(device, dtype)
        y = torch.randn(64, 8, generator=generator, dtype=torch.float64).to(device, dtype)
        optimizer.step(closure)
    return [p.detach().double().cpu() for p in model.parameters()]


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}, {"capturable": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("is_approx", [True, False])
@pytest.mark.parametrize("mars_type", TYPES)
def test_cuda_equals_cpu_in_float64(mars_type: str, is_approx: bool, options: dict[str, Any]) -> None:
    kind: dict[str, Any] = {"mars_type": mars_type, "is_approx": is_approx, **options}
    on_cpu = train("cpu", torch.float64, 20, **kind)
    on_cuda = train("cuda", torch.float64, 20, **kind)
    for ours, theirs in zip(on_cuda, on_cpu, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}, {"gamma": "tensor"}, {"clip_norm": None}], ids=str)
@pytest.mark.parametrize("mars_type", TYPES)
def test_no_synchronisation(mars_type: str, options: dict[str, Any]) -> None:
    if options.get("gamma") == "tensor":
        options = {"gamma": torch.tensor(0.05, device="cuda")}
    model = network("cuda")
    optimizer = MARS(model.parameters(), mars_type=mars_type, **options)
    for step in range(4):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # step 0 creates the state
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mars_type", TYPES)
def test_a_captured_step_replays(mars_type: str) -> None:
    models = [network("cuda"), network("cuda")]
    grads = [torch.randn_like(p) for p in models[0].parameters()]
    eager, captured = (MARS(m.parameters(), mars_type=mars_type, capturable=True) for m in models)
    for model in models:
        for p, grad in zip(model.parameters(), grads, strict=True):
            p.grad = grad.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        captured.step()  # creates the state
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    eager.step()
    for step in range(5):
        for model in models:
            for p, grad in zip(model.parameters(), grads, strict=True):
                assert p.grad is not None
                p.grad.copy_(grad * (step + 2))
        graph.replay()
        eager.step()
    for ours, theirs in zip(models[1].parameters(), models[0].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_half_precision_with_grad_scaler_in_exact_mode() -> None:
    model = network("cuda")
    optimizer = MARS(param_groups(model, "m", lr=1e-2), is_approx=False, max_grad_norm=1.0)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**30)  # too large: the first steps overflow
    x, y = torch.randn(64, 16, device="cuda"), torch.randn(64, 8, device="cuda")

    def backward(loss_of: Callable[[], Tensor]) -> float:
        with torch.autocast("cuda", torch.float16):
            loss = loss_of()
        scaler.scale(loss).backward()
        return loss.item()

    def loss_of() -> Tensor:
        return (model(x) - y).square().mean()

    losses: list[float] = []
    for _ in range(60):
        with optimizer.previous_params(grad_scaler=scaler):
            backward(loss_of)
        losses.append(backward(loss_of))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert optimizer.num_skipped_steps > 0
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.isfinite(p).all() for p in model.parameters())
