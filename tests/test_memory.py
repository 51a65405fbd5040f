"""State that fits: reduced precision, one buffer, gradients kept without a copy, steps in backward, offload."""

from __future__ import annotations

import copy
import io
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mars_optim import MARS
from mars_optim.backends import native
from mars_optim.ownership import read_only_addresses
from mars_optim.state import decode, decode_weight
from oracle import Oracle, real
from problems import BACKENDS, TYPES, MinibatchQuadratic, assert_close, make_parameters

SVD = {"polar_method": "svd", "polar_dtype": torch.float64}
backends = pytest.mark.parametrize("backend", BACKENDS)
types = pytest.mark.parametrize("mars_type", TYPES)

# Relative to the momentum's norm after 20 steps. A stochastic rounding moves an element by less than a spacing:
# 2^-7 (bf16), at most 2/127 of the block's largest (8 bits). Decay beta1 = 0.95 lets about 10 independent roundings'
# variances add up (1/(1-beta1^2)): factor 3.2 on an rms of spacing/sqrt(6).
MOMENT_ERROR = {"fp32": 1e-5, "bf16": 0.012, "8bit": 0.03}


def value(state: dict[str, Any], name: str) -> Tensor:
    return decode(state[name], state.get(f"{name}_scale"), torch.float32)


def matrices(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter((torch.randn(s, generator=generator) / 2).to(dtype)) for s in [(40, 30), (20, 50), (33,)]]


def drive(optimizer: MARS, parameters: list[nn.Parameter], steps: range, seed: int = 1) -> None:
    for t in steps:
        generator = torch.Generator().manual_seed(1000 * seed + t)
        for p in parameters:
            p.grad = (torch.randn(p.shape, generator=generator) * 0.01 + 0.02 * p.detach().float()).to(p.dtype)
        optimizer.step()


def jumping(parameters: list[nn.Parameter], sizes: list[float]) -> Iterator[None]:
    """Gradients whose norms jump about, one set for each of `sizes`."""
    for t, size in enumerate(sizes):
        generator = torch.Generator().manual_seed(t)
        for i, p in enumerate(parameters):
            p.grad = torch.randn(p.shape, generator=generator) * size * (1 + i) / p.numel() ** 0.5
        yield


SIZES = [0.01, 0.01, 0.012, 3.0, 2.0, 0.02, 0.02, 0.07, 0.2, 0.25, 0.3, 0.02, 50.0, 0.01, 0.05, 0.19]


# ------------------------------------------------------------------ precision of the state


@backends
@types
@pytest.mark.parametrize("precision", ["bf16", "8bit"])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}, {"clip_norm": None}, {"amsgrad": True}], ids=str)
def test_reduced_precision_follows_full_precision(
    backend: str, mars_type: str, precision: str, options: dict[str, Any]
) -> None:
    results: list[tuple[MARS, list[nn.Parameter]]] = []
    for chosen in ("fp32", precision):
        parameters = matrices()
        more = {**SVD, **options, "gamma": 0.2, "lr": 1e-3, "state_precision": chosen}
        optimizer = MARS(parameters, mars_type=mars_type, **BACKENDS[backend], **more)
        drive(optimizer, parameters, range(20))
        results.append((optimizer, parameters))
    (full, wanted), (reduced, got) = results
    for p, q in zip(got, wanted, strict=True):
        for name in ("exp_avg", "exp_avg_grad"):
            if name in full.state[q]:
                expected = full.state[q][name]
                error = (value(reduced.state[p], name) - expected).norm() / expected.norm()
                assert error < MOMENT_ERROR[precision]
        if "exp_avg_sq" in full.state[q]:
            expected = full.state[q]["exp_avg_sq"]
            assert (value(reduced.state[p], "exp_avg_sq") - expected).norm() / expected.norm() < 0.05
        # 20 steps of lr 1e-3: what rounding adds stays small beside the way travelled (signs near 0 may flip).
        travelled = (q - matrices()[[id(x) for x in wanted].index(id(q))]).norm()
        assert (p - q).norm() < (0.35 if mars_type == "lion" else 0.2) * travelled


@pytest.mark.parametrize("precision", ["bf16", "8bit"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan", "remainder8", "remainder16"])
@pytest.mark.parametrize("mars_type", ["adamw", "lion"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_backends_agree_on_reduced_precision(precision: str, rounding: str, mars_type: str, dtype: torch.dtype) -> None:
    """Rounding takes the same random bits everywhere; only where fp32 results straddle a decision may they part."""
    states: list[list[dict[str, Any]]] = []
    for options in BACKENDS.values():
        parameters = matrices(dtype)
        more: dict[str, Any] = {"state_precision": precision, "param_rounding": rounding, "gamma": 0.2, "lr": 0.01}
        optimizer = MARS(parameters, mars_type=mars_type, optimize_1d=True, max_grad_norm=1.0, **options, **more)
        drive(optimizer, parameters, range(3))
        states.append([{**optimizer.state[p], "weight": p.detach()} for p in parameters])
    for ours, *others in zip(*states, strict=True):
        for other in others:
            assert ours.keys() == other.keys()
            for name, tensor in ours.items():
                different = (tensor.float() != other[name].float()).float().mean()
                assert different <= (1.0 if name.endswith(("_scale", "coefficient", "remainder")) else 0.03), name
                if name == "weight":
                    torch.testing.assert_close(tensor, other[name], atol=0.03, rtol=0.03)


@backends
@types
def test_precision_can_be_chosen_for_each_tensor(backend: str, mars_type: str) -> None:
    parameters = matrices()
    setting = {"exp_avg": "bf16", "exp_avg_sq": "8bit", "prev_grad": "8bit"}
    optimizer = MARS(parameters, mars_type=mars_type, state_precision=setting, **SVD, **BACKENDS[backend])
    drive(optimizer, parameters, range(2))
    state = optimizer.state[parameters[0]]
    assert state["exp_avg"].dtype == torch.bfloat16
    assert state["prev_grad"].dtype == torch.int8
    if mars_type == "adamw":
        assert state["exp_avg_sq"].dtype == torch.uint8
    optimizer.param_groups[0]["state_precision"] = "fp32"  # a change of mind converts
    before = value(state, "exp_avg")
    drive(optimizer, parameters, range(2, 3))
    assert optimizer.state[parameters[0]]["exp_avg"].dtype == torch.float32
    assert (optimizer.state[parameters[0]]["exp_avg"] - before).norm() < before.norm()


@pytest.mark.parametrize(
    ("options", "dtype", "limit"),
    [
        ({}, torch.float32, 12.0),
        ({"state_precision": {"prev_grad": "bf16"}}, torch.float32, 10.0),
        ({"state_precision": "bf16"}, torch.float32, 6.0),
        ({"state_precision": "8bit"}, torch.float32, 3.3),
        ({"mars_type": "lion"}, torch.float32, 8.0),
        ({"mars_type": "lion", "clip_norm": None}, torch.float32, 4.0),
        ({"mars_type": "m", "clip_norm": None}, torch.float32, 4.0),
        ({"mars_type": "m", "clip_norm": None, "state_precision": "bf16"}, torch.float32, 2.0),
        ({"mars_type": "shampoo", "clip_norm": None, "state_precision": "8bit"}, torch.float32, 1.1),
        # The parameters' own two bytes are the rest of the seven.
        ({"state_precision": "8bit", "param_rounding": "remainder8"}, torch.bfloat16, 5.0),
    ],
    ids=str,
)
@backends
def test_bytes_of_state(backend: str, options: dict[str, Any], dtype: torch.dtype, limit: float) -> None:
    p = nn.Parameter(torch.randn(300, 200).to(dtype))
    optimizer = MARS([p], polar_steps=2, **BACKENDS[backend], **options)
    for _ in range(2):
        p.grad = torch.randn_like(p)
        optimizer.step()
    num_bytes = sum(t.nbytes for t in optimizer.state[p].values() if t.ndim > 0)
    assert num_bytes <= limit * p.numel()
    assert num_bytes > (limit - 0.35) * p.numel() or limit == 5.0


@backends
@types
def test_vectors_hold_no_previous_gradient(backend: str, mars_type: str) -> None:
    parameters = matrices()
    optimizer = MARS(parameters, mars_type=mars_type, **BACKENDS[backend])
    drive(optimizer, parameters, range(2))
    assert set(optimizer.state[parameters[2]]) == {"step", "exp_avg", "exp_avg_sq"}


@backends
@pytest.mark.parametrize("mars_type", ["adamw", "lion", "m"])
def test_sixteen_bit_remainders_make_bfloat16_parameters_exact(backend: str, mars_type: str) -> None:
    """The 32-bit weight behind bf16 parameters takes the very steps of an fp32 parameter with those gradients."""
    thin, full = matrices(torch.bfloat16)[:2], matrices(torch.bfloat16)[:2]
    full = [nn.Parameter(p.detach().float()) for p in full]
    options: dict[str, Any] = {"mars_type": mars_type, "lr": 1e-4, "gamma": 0.2, "weight_decay": 0.1, **SVD}
    one = MARS(thin, param_rounding="remainder16", **options, **BACKENDS[backend])
    other = MARS(full, **options, **BACKENDS[backend])
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        for p, q in zip(thin, full, strict=True):
            p.grad = torch.randn(p.shape, generator=generator).bfloat16()
            q.grad = p.grad.float()
        one.step()
        other.step()
        for p, q in zip(thin, full, strict=True):
            assert torch.equal(decode_weight(p.detach(), one.state[p]["param_remainder"]), q.detach())


@backends
@pytest.mark.parametrize("rounding", ["stochastic", "kahan", "remainder8", "remainder16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_updates_are_not_lost(backend: str, rounding: str, dtype: torch.dtype) -> None:
    """Steps of 1/20 of a spacing: rounding to nearest would stand still; these arrive, on average or exactly."""
    p = nn.Parameter(torch.ones(40, 50, dtype=dtype))
    spacing = torch.finfo(dtype).eps
    optimizer = MARS(
        [p], lr=spacing / 20, mars_type="lion", param_rounding=rounding, clip_norm=None, **BACKENDS[backend]
    )
    for _ in range(100):
        p.grad = -torch.ones_like(p)
        optimizer.step()
    arrived = (p.detach().double().mean() - 1) / spacing
    # Stochastic: 2000 elements, each the sum of 100 coin tosses of variance < 1/20: 5 standard errors are 0.25.
    assert abs(arrived - 5) < (0.25 if rounding == "stochastic" else 0.6)


@backends
@pytest.mark.parametrize("rounding", ["kahan", "remainder8", "remainder16"])
def test_a_weight_that_overflows_is_inf_and_has_no_remainder(backend: str, rounding: str) -> None:
    p = nn.Parameter(torch.full((4, 40), 6e4, dtype=torch.float16))
    optimizer = MARS([p], lr=1e4, mars_type="lion", param_rounding=rounding, **BACKENDS[backend])
    for _ in range(2):
        p.grad = -torch.ones_like(p)
        optimizer.step()
        assert torch.isposinf(p).all()
        assert torch.count_nonzero(optimizer.state[p]["param_remainder"]) == 0


@backends
@pytest.mark.parametrize("before", ["fp32", "bf16", "8bit"])
@pytest.mark.parametrize("after", ["fp32", "bf16", "8bit"])
def test_checkpoints_move_between_precisions_and_backends(backend: str, before: str, after: str) -> None:
    saved = matrices()
    writer = MARS(saved, gamma=0.2, state_precision=before, **BACKENDS["reference"])
    drive(writer, saved, range(10))
    buffer = io.BytesIO()
    torch.save(writer.state_dict(), buffer)
    buffer.seek(0)
    loaded = [nn.Parameter(p.detach().clone()) for p in saved]
    reader = MARS(loaded, gamma=0.2, state_precision=after, **BACKENDS[backend])
    reader.load_state_dict(torch.load(buffer, weights_only=False))
    assert reader.param_groups[0]["state_precision"] == after
    for p, q in zip(loaded, saved, strict=True):
        for name in ("exp_avg", "exp_avg_sq", "prev_grad"):
            if name in writer.state[q]:
                expected = value(writer.state[q], name)
                error = (value(reader.state[p], name) - expected).norm() / expected.norm()
                assert error <= (0 if after in ("fp32", before) else {"bf16": 2e-3, "8bit": 0.01}[after])
    drive(writer, saved, range(10, 15))
    drive(reader, loaded, range(10, 15))
    for p, q in zip(loaded, saved, strict=True):
        torch.testing.assert_close(p, q, atol=1e-6 if before == after == "fp32" else 2e-3, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_precision": "fp8"}, "state_precision must have precision fp32, bf16, 8bit; got 'fp8'"),
        ({"state_precision": {"exp_avg": "int8"}}, "exp_avg must have precision"),
        ({"state_precision": {"momentum": "bf16"}}, "may name exp_avg, exp_avg_sq, prev_grad; got 'momentum'"),
        ({"param_rounding": "up"}, "param_rounding must be one of nearest, stochastic, kahan"),
        ({"donate_grads": 1}, "donate_grads must be of type bool or NoneType; got 1"),
        ({"offload_state": "cpu"}, "offload_state must be of type bool; got 'cpu'"),
        ({"offload_state": True, "capturable": True}, "offload_state=True moves state outside of the step"),
    ],
    ids=str,
)
def test_bad_settings_say_what_would_do(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MARS(matrices(), **options)


# ------------------------------------------------------------------ one buffer


@backends
@pytest.mark.parametrize("mars_type", ["lion", "shampoo", "m"])
@pytest.mark.parametrize("first_step", ["paper", "zero"])
@pytest.mark.parametrize("capturable", [False, True])
def test_one_buffer_takes_the_steps_of_two(backend: str, mars_type: str, first_step: str, capturable: bool) -> None:
    """Float64, against the oracle with its two buffers; the betas change midway."""
    parameters = make_parameters(("wide", "tall", "conv"))
    options = {"gamma": 0.3, "first_step": first_step, "clip_norm": None, "lr": 1e-2, "mars_type": mars_type}
    optimizer = MARS(parameters, capturable=capturable, max_grad_norm=0.5, **options, **SVD, **BACKENDS[backend])
    oracle = Oracle(parameters, max_grad_norm=0.5, **options)
    problem = MinibatchQuadratic(parameters)
    for t in range(20):
        oracle.step(problem.gradients(oracle.x, t))
        problem.assign(parameters, t)
        optimizer.step()
        for p, x in zip(parameters, oracle.x, strict=True):
            assert_close(p, x, atol=1e-6 if capturable else 1e-9, what=f"step {t}")  # the flag is float32
    assert all("prev_grad" not in s and "exp_avg" not in s for s in optimizer.state.values())


@pytest.mark.parametrize("gamma", [0.95, 1.0, torch.tensor(0.1), lambda step: 0.1])
def test_two_buffers_where_one_does_not_suffice(gamma: Any) -> None:
    parameters = matrices()
    optimizer = MARS(parameters, mars_type="lion", clip_norm=None, gamma=gamma)
    drive(optimizer, parameters, range(2))
    assert "prev_grad" in optimizer.state[parameters[0]]


@backends
@pytest.mark.parametrize("mars_type", ["lion", "m"])
def test_a_two_buffer_checkpoint_continues_in_one(backend: str, mars_type: str) -> None:
    """m_t and g_{t-1} give e_t; the oracle never changes."""
    parameters = make_parameters(("wide", "tall"))
    options: dict[str, Any] = {"mars_type": mars_type, "lr": 1e-2, **SVD}
    two = MARS(parameters, clip_norm=1e9, gamma=0.2, max_grad_norm=0.5, **options, **BACKENDS[backend])
    oracle = Oracle(parameters, mars_type=mars_type, clip_norm=None, gamma=0.2, lr=1e-2, max_grad_norm=0.5)
    problem = MinibatchQuadratic(parameters)

    def take(optimizer: MARS, steps: range) -> None:
        for t in steps:
            oracle.step(problem.gradients(oracle.x, t))
            problem.assign(parameters, t)
            optimizer.step()
            for p, x in zip(parameters, oracle.x, strict=True):
                assert_close(p, x, atol=1e-9, what=f"step {t}")

    take(two, range(8))
    one = MARS(parameters, clip_norm=None, gamma=0.2, max_grad_norm=0.5, **options, **BACKENDS[backend])
    saved = copy.deepcopy(two.state_dict())
    saved["param_groups"][0]["clip_norm"] = None
    one.load_state_dict(saved)
    take(one, range(8, 16))
    assert "exp_avg_grad" in one.state[parameters[0]]


# ------------------------------------------------------------------ the previous gradient without a copy


def shares_memory(a: Tensor, b: Tensor) -> bool:
    return read_only_addresses([a]) == read_only_addresses([b])


def train(zero: Callable[[MARS], Any], *, donate: bool | None, steps: int = 6, **options: Any) -> tuple[Tensor, bool]:
    """Weights after some steps of a small network, and whether the last gradient was kept without a copy."""
    torch.manual_seed(0)
    model = nn.Linear(8, 8, bias=False)
    optimizer = MARS(model.parameters(), lr=0.05, gamma=0.5, donate_grads=donate, **options)
    x = torch.randn(steps, 16, 8, generator=torch.Generator().manual_seed(1))
    shared = False
    for t in range(steps):
        model(x[t]).square().mean().backward()
        grad = model.weight.grad
        assert grad is not None
        address = read_only_addresses([grad])
        del grad
        optimizer.step()
        shared = read_only_addresses([optimizer.state[model.weight]["prev_grad"]]) == address
        zero(optimizer)
    return model.weight.detach().clone(), shared


@backends
def test_fresh_gradients_are_kept_and_reused_ones_survive(backend: str) -> None:
    wanted, copied = train(lambda o: o.zero_grad(), donate=False, **BACKENDS[backend])
    kept, shared = train(lambda o: o.zero_grad(), donate=None, **BACKENDS[backend])
    donated, given = train(lambda o: o.zero_grad(), donate=True, **BACKENDS[backend])
    assert (copied, shared, given) == (False, True, True)
    assert torch.equal(kept, wanted)
    assert torch.equal(donated, wanted)
    for zero in (
        lambda o: o.zero_grad(set_to_none=False),
        lambda o: [p.grad.zero_() for p in o.param_groups[0]["params"]],
        lambda o: [p.grad.copy_(torch.zeros_like(p)) for p in o.param_groups[0]["params"]],
        lambda o: [p.grad.numpy().fill(0) for p in o.param_groups[0]["params"]],
        lambda o: [torch.from_dlpack(p.grad).zero_() for p in o.param_groups[0]["params"]],
    ):
        assert torch.equal(train(zero, donate=None, **BACKENDS[backend])[0], wanted)


@backends
def test_memory_that_others_hold_is_copied(backend: str) -> None:
    """Whoever has had numpy's, DLPack's or another view of a gradient before the step may write to it afterwards."""
    for hold in (
        lambda g: g.numpy(),
        lambda g: g.detach(),
        lambda g: g[1:],
        lambda g: g.__dlpack__(),
    ):
        p = nn.Parameter(torch.ones(4, 4))
        optimizer = MARS([p], **BACKENDS[backend])
        p.grad = torch.full((4, 4), 3.0)
        held = hold(p.grad)
        optimizer.step()
        assert not shares_memory(optimizer.state[p]["prev_grad"], p.grad)
        del held
    # Of the second nobody else holds the memory, but to keep it would keep all nine rows.
    for grad in (
        torch.ones(9, 4)[:4],
        torch.ones(9, 4)[:4].detach(),
        torch.ones(4, 8)[:, ::2],
        torch.ones(4, 4).share_memory_(),
    ):
        p = nn.Parameter(torch.ones(4, 4))
        optimizer = MARS([p], **BACKENDS[backend])
        p.grad = grad
        optimizer.step()
        assert not shares_memory(optimizer.state[p]["prev_grad"], p.grad)


@pytest.fixture
def one_process_group(tmp_path: Any) -> Iterator[None]:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@backends
@pytest.mark.parametrize("as_view", [False, True])
@pytest.mark.parametrize("set_to_none", [False, True])
@pytest.mark.usefixtures("one_process_group")
def test_ddp_buckets(backend: str, as_view: bool, set_to_none: bool) -> None:
    def run(wrap: Callable[[nn.Module], nn.Module], donate: bool | None) -> Tensor:
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 6, bias=False))
        model = wrap(inner)
        optimizer = MARS(inner.parameters(), lr=0.05, gamma=0.5, donate_grads=donate, **BACKENDS[backend])
        for t in range(6):
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(t))
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
        return torch.cat([p.detach().flatten() for p in inner.parameters()])

    wanted = run(lambda m: m, False)
    got = run(lambda m: DistributedDataParallel(m, gradient_as_bucket_view=as_view), None)
    torch.testing.assert_close(got, wanted, atol=1e-7, rtol=0)


# ------------------------------------------------------------------ the step in backward


def network() -> nn.Module:
    torch.manual_seed(0)
    # No norm after a matrix: its gradient would lack a direction, and the polar factor of rounding errors is anything.
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))


def losses(model: nn.Module) -> Iterator[Tensor]:
    for t in range(6):
        x = torch.randn(40, 8, generator=torch.Generator().manual_seed(t))
        yield (model(x) - x).square().mean()


@backends
@types
def test_step_in_backward_is_the_step(backend: str, mars_type: str) -> None:
    usual, streamed, one_each = network(), network(), network()
    options: dict[str, Any] = {"lr": 0.02, "gamma": lambda step: 0.1 + 0.05 * step, "mars_type": mars_type, **SVD}
    first, second = (MARS(m.parameters(), **options, **BACKENDS[backend]) for m in (usual, streamed))
    for loss in losses(usual):
        loss.backward()
        first.step()
        first.zero_grad()
    for loss in losses(streamed):
        with second.step_in_backward():
            loss.backward()
        assert all(p.grad is None for p in streamed.parameters())
    optimizers = {p: MARS([p], **options, **BACKENDS[backend]) for p in one_each.parameters()}

    def hook(p: nn.Parameter) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in one_each.parameters():
        p.register_post_accumulate_grad_hook(hook)
    for loss in losses(one_each):
        loss.backward()
    for a, b, c in zip(usual.parameters(), streamed.parameters(), one_each.parameters(), strict=True):
        torch.testing.assert_close(b, a, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(c, a, atol=1e-6, rtol=1e-5)
    assert second.param_groups[0]["schedule_step"] == first.param_groups[0]["schedule_step"] == 6


def test_step_in_backward_after_accumulation_and_after_an_exception() -> None:
    model, twin = network(), network()
    optimizer, plain = MARS(model.parameters(), gamma=0.2), MARS(twin.parameters(), gamma=0.2)
    for m, in_backward in ((model, True), (twin, False)):
        first, second, *_ = losses(m)
        first.backward()
        if in_backward:
            with optimizer.step_in_backward():
                second.backward()
        else:
            second.backward()
            plain.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-6)
    with pytest.raises(ZeroDivisionError), optimizer.step_in_backward():
        raise ZeroDivisionError
    before = [p.detach().clone() for p in model.parameters()]
    next(losses(model)).backward()  # no hook is left behind
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"is_approx": False}, "is_approx=False"),
        ({"skip_nonfinite": True}, "skip_nonfinite=True"),
        ({"max_grad_norm": 1.0}, "max_grad_norm=None"),
    ],
    ids=str,
)
def test_step_in_backward_refuses_what_needs_all_gradients(options: dict[str, Any], message: str) -> None:
    optimizer = MARS(matrices(), **options)
    with pytest.raises(RuntimeError, match=message), optimizer.step_in_backward():
        pass


# ------------------------------------------------------------------ offload


@backends
@types
@pytest.mark.parametrize("is_approx", [True, False])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.2}, {"state_precision": "8bit"}], ids=str)
def test_offloaded_state_takes_the_same_steps(
    backend: str, mars_type: str, is_approx: bool, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mars_optim.offload.CHUNK_BYTES", 5000)
    results: list[list[nn.Parameter]] = []
    for offload in (False, True):
        parameters = matrices()
        more = {**options, **SVD, "gamma": 0.2, "offload_state": offload, "is_approx": is_approx}
        optimizer = MARS(parameters, mars_type=mars_type, **BACKENDS[backend], **more)
        for t in range(5):

            def closure(t: int = t, parameters: list[nn.Parameter] = parameters) -> Tensor:
                generator = torch.Generator().manual_seed(t)
                for p in parameters:
                    p.grad = torch.randn(p.shape, generator=generator) * 0.01 + 0.02 * p.detach()
                return torch.zeros(())

            optimizer.step(closure)
        results.append(parameters)
    for p, q in zip(*results, strict=True):
        assert math.isfinite(float(real(p).sum()))
        torch.testing.assert_close(p, q, atol=1e-6, rtol=0)


# ------------------------------------------------------------------ clips recognised by a bound


@pytest.mark.parametrize("mars_type", ["adamw", "lion", "m"])
@pytest.mark.parametrize(
    "options",
    [{}, {"max_grad_norm": 1.0}, {"donate_grads": False}, {"state_precision": "bf16"}, {"state_precision": "8bit"}],
    ids=str,
)
def test_a_bound_finds_what_measuring_finds(mars_type: str, options: dict[str, Any]) -> None:
    """Norms of g and g' spare reading g' where they say that nothing is clipped; gradients here jump about."""
    results: list[list[nn.Parameter]] = []
    for knows_norms in (True, False):
        parameters = matrices()
        optimizer = MARS(parameters, mars_type=mars_type, fused=True, gamma=0.3, lr=0.01, **options, **SVD)
        for _ in jumping(parameters, SIZES):
            if not knows_norms:
                optimizer._steps.norms.clear()
            optimizer.step()
            assert len(optimizer._steps.norms) >= 2
        results.append(parameters)
    # Tensors that were updated before a clip was known to be needed differ by roundings of the amendment.
    exact = mars_type == "m" or options
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=0 if exact else 3e-7, atol=0 if exact else 1e-7)


# ------------------------------------------------------------------ previous gradients that change places


def large_matrices() -> list[nn.Parameter]:
    """Large enough to be measured one by one; three have one shape."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(400, 330), (300, 500), (400, 330), (20, 30), (400, 330), (33,)]
    return [nn.Parameter(torch.randn(s, generator=generator) / 2) for s in shapes]


@pytest.mark.parametrize("mars_type", ["adamw", "lion"])
@pytest.mark.parametrize("precision", ["bf16", {"prev_grad": "bf16"}], ids=str)
def test_previous_gradients_change_places(mars_type: str, precision: Any) -> None:
    """So g' is still there when a clip turns out to be needed; against the backend that knows nothing of this."""
    results: list[list[nn.Parameter]] = []
    previous: list[list[Tensor]] = []
    options: dict[str, Any]
    for options in ({"fused": True}, {"foreach": False}):
        parameters = large_matrices()
        optimizer = MARS(parameters, mars_type=mars_type, lr=0.01, gamma=0.3, state_precision=precision, **options)
        seen: set[int] = set()
        for _ in jumping(parameters, SIZES):
            optimizer.step()
            seen.add(optimizer.state[parameters[0]]["prev_grad"].data_ptr())
        assert len(seen) > 1 or "foreach" in options
        results.append(parameters)
        previous.append([s["prev_grad"] for s in optimizer.state.values() if "prev_grad" in s])
    for ours, theirs in zip(*previous, strict=True):
        assert torch.equal(ours, theirs)
    for p, q in zip(*results, strict=True):
        # What was amended was drawn twice: of AdamW's steps a spacing of bf16, on average less than one of one step; a
        # momentum near 0 may have either sign, which is all that Lion sees.
        off = (p - q).abs()
        if precision == "bf16" and mars_type == "adamw":
            assert off.max() <= 16 * 0.01 * 2**-7
            assert off.mean() <= 0.01 * 2**-7
        elif precision == "bf16":
            assert (off > 1e-6).float().mean() <= 0.02
        else:
            assert (off > 2e-6).float().mean() <= (1e-4 if mars_type == "lion" else 0)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_spare_memory_is_bounded_and_given_back(threads: Callable[[int], None]) -> None:
    threads(1)
    parameters = [nn.Parameter(torch.ones(2000, 500)), *large_matrices()]  # the first alone is more than half
    optimizer = MARS(parameters, state_precision="bf16")
    gradients = jumping(parameters, [0.01] * 8)
    for _ in range(3):
        next(gradients)
        optimizer.step()
    of_two_shapes = 2 * (400 * 330 + 300 * 500)
    assert optimizer._steps.spares.nbytes == of_two_shapes
    next(gradients)
    parameters[2].grad = None
    optimizer.step()
    assert optimizer._steps.spares.nbytes == 2 * 400 * 330  # that of the other shape has gone
    threads(9)  # then two tasks a tensor are too few, and half of the previous gradients' memory is the limit
    next(gradients)
    optimizer.step()
    assert optimizer._steps.spares.nbytes == 2 * (3 * 400 * 330 + 300 * 500)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer._steps.spares.nbytes == 0
    others: list[dict[str, Any]] = [
        {"state_precision": "fp32"},
        {"clip_norm": None},
        {"state_precision": "8bit"},
        {"state_precision": {"prev_grad": "bf16", "exp_avg": "bf16"}},
        {"max_grad_norm": 1.0},
        {"amsgrad": True},
    ]
    for options in others:
        optimizer = MARS(parameters, **{"state_precision": "bf16", **options})
        for _ in jumping(parameters, SIZES[:3]):
            optimizer.step()
        assert optimizer._steps.spares.nbytes == 0


def test_spares_go_round(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters, made, empty_like = large_matrices(), [0], torch.empty_like
    optimizer = MARS(parameters, state_precision="bf16")

    def counting(like: Tensor, **options: Any) -> Tensor:
        made[0] += like.dtype == torch.bfloat16 and like.numel() == 400 * 330
        return empty_like(like, **options)

    monkeypatch.setattr(torch, "empty_like", counting)
    for step, _ in enumerate(jumping(parameters, [0.01] * 8)):
        optimizer.step()
        if step == 1:
            made_first = made[0]
    assert made[0] == made_first >= 1


def test_threads_and_holders_change_nothing(threads: Callable[[int], None]) -> None:
    results: list[list[nn.Parameter]] = []
    for count, holds in ((1, False), (9, False), (2, True)):
        threads(count)
        parameters = large_matrices()
        optimizer = MARS(parameters, state_precision="bf16")
        held: list[Tensor] = []
        for _ in jumping(parameters, SIZES):
            optimizer.step()
            if holds:
                held = [state["prev_grad"] for state in optimizer.state.values() if "prev_grad" in state]
        results.append(parameters)
        assert bool(held) == holds
    for p, *others in zip(*results, strict=True):
        assert all(torch.equal(p, q) for q in others)


@pytest.mark.parametrize("which", [1, 2, 3, 4])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interruption_leaves_each_its_own_previous_gradient(
    when: str, which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal's exception may come before the kernels have run, or wait until they are done."""
    parameters, whole = large_matrices(), native.run
    second = large_matrices()
    optimizer = MARS([{"params": parameters}, {"params": second, "lr": 0.01}], state_precision="bf16")
    everything = parameters + second
    gradients = jumping(everything, [0.01] * 8)
    past: list[list[Tensor]] = []
    num_calls = 0

    def interrupted(*arguments: Any) -> None:
        nonlocal num_calls
        num_calls += 1
        if when == "after" or num_calls != which:
            whole(*arguments)
        if num_calls == which:
            raise KeyboardInterrupt

    for step, _ in enumerate(gradients):
        past.append([torch.empty(0) if p.grad is None else p.grad.bfloat16() for p in everything])
        with monkeypatch.context() as patch:
            if step == 4:
                patch.setattr(native, "run", interrupted)
            try:
                optimizer.step()
            except KeyboardInterrupt:
                assert step == 4
            else:
                assert step != 4
        for i, p in enumerate(everything):
            if "prev_grad" in optimizer.state[p]:
                kept = optimizer.state[p]["prev_grad"]
                assert torch.equal(kept, past[-1][i]) or (step == 4 and torch.equal(kept, past[-2][i]))


def test_previous_gradients_in_shared_memory_stay_where_they_are() -> None:
    parameters = large_matrices()
    optimizer = MARS(parameters, state_precision="bf16")
    places: list[int] = []
    for step, _ in enumerate(jumping(parameters, [0.01] * 5)):
        optimizer.step()
        states = [state for state in optimizer.state.values() if "prev_grad" in state]
        if step == 1:
            for state in states:
                state["prev_grad"].share_memory_()
            places = [state["prev_grad"].data_ptr() for state in states]
        elif step > 1:
            assert [state["prev_grad"].data_ptr() for state in states] == places


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_complex_and_permuted_previous_gradients(layout: torch.memory_format, dtype: torch.dtype) -> None:
    parameters = [nn.Parameter(torch.zeros(128, 64, 5, 5, dtype=dtype).to(memory_format=layout)) for _ in range(3)]
    optimizer = MARS(parameters, state_precision="bf16")
    ramp = torch.arange(parameters[0].numel()).view_as(parameters[0]) / 1e9
    for step in range(4):
        for i, p in enumerate(parameters):
            p.grad = torch.empty_like(p).copy_(ramp * (1 + i + step))
        optimizer.step()
    for i, p in enumerate(parameters):
        kept = optimizer.state[p]["prev_grad"]
        want = (ramp * (4 + i)).bfloat16()
        assert torch.equal(kept if dtype == torch.float32 else kept[..., 0], want)


def test_a_previous_gradient_at_hand_never_becomes_another_tensors() -> None:
    """One that is held elsewhere, or whose memory is, stays as it is or goes on with its parameter, as state does."""
    parameters = large_matrices()
    optimizer = MARS(parameters, state_precision="bf16")
    past: list[list[Tensor]] = [[] for _ in parameters]
    held: list[tuple[int, Tensor]] = []
    storages: list[tuple[int, torch.UntypedStorage]] = []
    for t, _ in enumerate(jumping(parameters, [0.01] * 16)):
        for gradients, p in zip(past, parameters, strict=True):
            assert p.grad is not None
            gradients.append(p.grad.bfloat16())
        optimizer.step()
        for i, tensor in held:
            assert any(torch.equal(tensor, g) for g in past[i])
        for i, storage in storages:
            seen = torch.frombuffer(bytearray(storage), dtype=torch.bfloat16).view_as(past[i][0])
            assert any(torch.equal(seen, g) for g in past[i])
            del seen
        if t == 11:
            storages = [(i, optimizer.state[p]["prev_grad"].untyped_storage()) for i, p in enumerate(parameters[:5])]
        if t in (3, 7):
            previous = {i: s["prev_grad"] for i, s in optimizer.state_dict()["state"].items() if "prev_grad" in s}
            held += previous.items() if t == 3 else [(i, g.detach()) for i, g in previous.items()]
            del previous
    assert len(held) == 10


def test_a_checkpoint_continues_where_previous_gradients_change_places() -> None:
    straight, other = large_matrices(), large_matrices()
    first, second = MARS(straight, state_precision="bf16"), MARS(other, state_precision="bf16")
    third = None
    for t, _ in enumerate(zip(jumping(straight, [0.01] * 8), jumping(other, [0.01] * 8), strict=True)):
        if t == 4:
            third = MARS(other, state_precision="bf16")
            third.load_state_dict(copy.deepcopy(second.state_dict()))
        for optimizer in (first, third or second):
            optimizer.step()
    for p, q in zip(straight, other, strict=True):
        assert torch.equal(p, q)
