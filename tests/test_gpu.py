"""What only a CUDA device can show. Without one, every test here is skipped; `make gpu` runs them all.

The kernels' accesses to memory, and races between threads, under NVIDIA's sanitizer (slow: a few tests at a time):

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m pytest tests/test_gpu.py -k fused
    compute-sanitizer --tool racecheck python -m pytest tests/test_gpu.py -k fused
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mars_optim import MARS, backends, param_groups
from mars_optim.backends import triton
from mars_optim.state import ROUNDINGS, decode_weight

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


@pytest.mark.parametrize(
    "options",
    [{}, {"max_grad_norm": 0.5}, {"capturable": True}, {"foreach": False}, {"foreach": True}, {"clip_norm": None}],
    ids=str,
)
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


# ------------------------------------------------------------------ the fused kernels

# Blocks have 1024 elements, 8-bit blocks 128; channels_last and unaligned tensors follow below.
SIZES = [(33, 41), (129,), (0, 3), (1, 1), (8, 128), (1025,), (3, 1024), (4097,)]
FORMATS: list[dict[str, Any]] = [
    {"dtype": torch.float32},
    {"dtype": torch.float64},
    {"dtype": torch.float32, "state_precision": "bf16"},
    {"dtype": torch.float32, "state_precision": "8bit"},
    *(
        {"dtype": dtype, "param_rounding": rounding, "state_precision": precision}
        for dtype in (torch.bfloat16, torch.float16)
        for rounding in ROUNDINGS
        for precision in ("fp32", "8bit")
    ),
]


def tensors(dtype: torch.dtype = torch.float32, device: str = "cuda") -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter((torch.randn(s, generator=generator) / 2).to(device, dtype)) for s in SIZES]


def give_gradients(parameters: list[nn.Parameter], t: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(100 + t)
    for p in parameters:
        g = torch.randn(p.shape, generator=generator) * (0.02 if t % 2 else 0.2)
        p.grad = (g.to(p.dtype) * scale).to(p.device)


def assert_same(ours: MARS, theirs: MARS, ps: list[nn.Parameter], qs: list[nn.Parameter], *, rounds: bool) -> None:
    """fp32 rounding apart; where weights are rounded at random, one may fall to the other side."""
    for p, q in zip(ps, qs, strict=True):
        mine, wanted = (
            decode_weight(x.detach(), o.state[x].get("param_remainder")) if x.itemsize == 2 else x.detach()
            for o, x in ((ours, p), (theirs, q))
        )
        rtol, atol = (3e-2, 1e-4) if rounds else (1e-4, 5e-6)
        torch.testing.assert_close(mine, wanted.to(mine.device), rtol=rtol, atol=atol)


def test_fused_is_the_default_on_cuda() -> None:
    assert backends.select(MARS(tensors()).param_groups[0]) is triton
    assert backends.select(MARS(tensors(), fused=True).param_groups[0]) is triton


@pytest.mark.parametrize("formats", FORMATS, ids=lambda f: "-".join(str(v) for v in f.values()))
@pytest.mark.parametrize(
    ("mars_type", "options"),
    [
        ("adamw", {"amsgrad": True}),
        ("adamw", {"max_grad_norm": 0.5, "capturable": True}),
        ("lion", {"clip_norm": None, "optimize_1d": True}),
    ],
    ids=str,
)
def test_fused_equals_the_reference(mars_type: str, options: dict[str, Any], formats: dict[str, Any]) -> None:
    formats = dict(formats)
    dtype = formats.pop("dtype")
    ps, qs = tensors(dtype), tensors(dtype)
    shared: dict[str, Any] = {"mars_type": mars_type, "lr": 1e-2, "gamma": 0.2, "weight_decay": 0.1}
    ours = MARS(ps, fused=True, **shared, **options, **formats)
    theirs = MARS(qs, foreach=False, **shared, **options, **formats)
    for t in range(4):
        give_gradients(ps, t)
        give_gradients(qs, t)
        ours.step()
        theirs.step()
    assert_same(ours, theirs, ps, qs, rounds=dtype.itemsize == 2 or "state_precision" in formats)


def test_fused_with_memory_that_is_not_aligned_or_laid_out_otherwise() -> None:
    ps = [nn.Parameter(torch.randn(n + 1, device="cuda")[1:]) for n in (5, 1100, 5000)]
    ps.append(nn.Parameter(torch.randn(4, 3, 50, 20, device="cuda").to(memory_format=torch.channels_last)))
    qs = [nn.Parameter(p.detach().clone()) for p in ps]
    ours, theirs = MARS(ps, optimize_1d=True, fused=True), MARS(qs, optimize_1d=True, foreach=False)
    for t in range(3):
        give_gradients(ps, t)  # the last one contiguous
        give_gradients(qs, t)
        ours.step()
        theirs.step()
    assert_same(ours, theirs, ps, qs, rounds=False)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}, {"capturable": True}, {"clip_norm": None}], ids=str)
@pytest.mark.parametrize("formats", [FORMATS[0], FORMATS[-1]], ids=str)
@pytest.mark.parametrize("mars_type", TYPES)
def test_fused_without_synchronisation(mars_type: str, formats: dict[str, Any], options: dict[str, Any]) -> None:
    """Also with gradients at new addresses, whose table is uploaded."""
    formats = dict(formats)
    ps = tensors(formats.pop("dtype"))
    optimizer = MARS(ps, mars_type=mars_type, fused=True, **options, **formats)
    held: list[Tensor] = []
    for t in range(4):
        give_gradients(ps, t)
        held += [p.grad for p in ps if p.grad is not None]
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if t else "default")  # the first step creates the state
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("formats", [FORMATS[0], FORMATS[3], FORMATS[-1]], ids=str)
@pytest.mark.parametrize("mars_type", ["adamw", "lion", "m"])
def test_a_captured_fused_step_replays(mars_type: str, formats: dict[str, Any]) -> None:
    """Eager steps between, at other addresses, leave the graph's tables alone."""
    formats = dict(formats)
    dtype = formats.pop("dtype")
    ps, qs = tensors(dtype), tensors(dtype)
    captured, eager = (MARS(x, mars_type=mars_type, capturable=True, fused=True, **formats) for x in (ps, qs))
    give_gradients(ps, 0)
    static = [p.grad for p in ps]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        captured.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    give_gradients(qs, 0)
    eager.step()
    for t in range(1, 4):
        give_gradients(ps, t)
        for old, p in zip(static, ps, strict=True):
            assert old is not None
            assert p.grad is not None
            old.copy_(p.grad)
        give_gradients(qs, t)
        graph.replay()
        eager.step()
    assert_same(captured, eager, ps, qs, rounds=False)


@pytest.mark.parametrize("mars_type", TYPES)
@pytest.mark.parametrize("formats", [FORMATS[0], FORMATS[-1]], ids=str)
def test_a_grad_scaler_with_fused_kernels(mars_type: str, formats: dict[str, Any]) -> None:
    """Nobody waits for found_inf; where it is 1 nothing changes."""
    formats = dict(formats)
    dtype = formats.pop("dtype")
    ps, qs = tensors(dtype), tensors(dtype)
    ours, plain = (MARS(x, mars_type=mars_type, capturable=True, fused=True, **formats) for x in (ps, qs))
    assert ours._step_supports_amp_scaling
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**4)
    for t in range(5):
        scaler.scale(torch.zeros((), device="cuda"))
        give_gradients(ps, t, scaler.get_scale())
        if t in (1, 3):
            assert ps[0].grad is not None
            ps[0].grad[1, 1] = float("inf")
            before = [x.clone() for p in ps for x in (p.detach(), *ours.state[p].values())]
        scaler.step(ours)
        scaler.update()
        if t in (1, 3):
            after = [x for p in ps for x in (p.detach(), *ours.state[p].values())]
            assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        else:
            give_gradients(qs, t)
            plain.step()
    assert_same(ours, plain, ps, qs, rounds=dtype.itemsize == 2)


@pytest.mark.parametrize("mars_type", TYPES)
def test_offloaded_state_takes_the_same_steps(mars_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunk by chunk: at most two chunks of state visit at a time."""
    monkeypatch.setattr("mars_optim.offload.chunked.__defaults__", (4096,))
    ps, qs = tensors(), tensors()
    away = MARS(ps, mars_type=mars_type, offload_state=True, fused=True)
    here = MARS(qs, mars_type=mars_type, donate_grads=False, fused=True)
    for t in range(4):
        give_gradients(ps, t)
        give_gradients(qs, t)
        away.step()
        here.step()
    state = away.state_dict()["state"]
    assert all(not value.is_cuda for entries in state.values() for value in entries.values())
    assert_same(away, here, ps, qs, rounds=False)
