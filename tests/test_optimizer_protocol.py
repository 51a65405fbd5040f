"""The torch.optim protocol beyond PyTorch's own checks: who owns gradients, what a checkpoint carries, what a
skipped step leaves, what the second evaluation of exact mode sees, and that the step never waits for a device.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from mars_optim import MARS, schedules
from oracle import Oracle
from problems import (
    BACKENDS,
    ELEMENTWISE,
    MODES,
    TYPES,
    MinibatchQuadratic,
    assert_close,
    linear,
    make_parameters,
)

Options = dict[str, Any]
SVD: Options = {"polar_method": "svd", "polar_dtype": torch.float64}
NAMES = ("scalar", "vector", "wide", "tall", "conv", "empty_matrix")

backends = pytest.mark.parametrize("backend", BACKENDS)
types = pytest.mark.parametrize("mars_type", TYPES)
modes = pytest.mark.parametrize("mode", MODES)


def take_steps(
    optimizer: MARS, parameters: Sequence[Tensor], steps: Sequence[int], problem: MinibatchQuadratic | None = None
) -> None:
    problem = problem or MinibatchQuadratic(parameters)
    for t in steps:
        optimizer.step(lambda t=t: problem.assign(parameters, t))


def clones(parameters: Sequence[Tensor]) -> list[Parameter]:
    return [Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in parameters]


def assert_same(left: Sequence[Tensor], right: Sequence[Tensor]) -> None:
    """Bit for bit."""
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)


def assert_same_state(left: MARS, right: MARS) -> None:
    a, b = left.state_dict()["state"], right.state_dict()["state"]
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].keys() == b[key].keys()
        for name, value in a[key].items():
            assert torch.is_tensor(value), f"{name} isn't a tensor"
            assert value.dtype == b[key][name].dtype
            assert torch.equal(value, b[key][name]), name


def snapshot(optimizer: MARS, parameters: Sequence[Tensor]) -> Any:
    return [p.detach().clone() for p in parameters], copy.deepcopy(optimizer.state_dict()["state"])


def assert_unchanged(optimizer: MARS, parameters: Sequence[Tensor], before: Any) -> None:
    assert_same([p.detach() for p in parameters], before[0])
    after = optimizer.state_dict()["state"]
    for key, state in before[1].items():
        for name, value in state.items():
            assert torch.equal(after[key][name], value), name


# ------------------------------------------------------------------ what the state is


@backends
@types
@modes
def test_state_names_and_formats(backend: str, mars_type: str, mode: str) -> None:
    parameters = make_parameters(("vector", "wide"), torch.bfloat16)
    optimizer = MARS(parameters, mars_type=mars_type, is_approx=MODES[mode], **BACKENDS[backend])
    take_steps(optimizer, parameters, range(2))
    vector, matrix = (optimizer.state[p] for p in parameters)
    for state in (vector, matrix):
        assert all(torch.is_tensor(value) for value in state.values())
        assert state["step"].shape == ()
        assert state["step"].dtype == torch.float32
        assert state["step"].device.type == "cpu"
        assert state["exp_avg"].dtype == torch.float32
        assert "max_exp_avg_sq" not in state
    assert matrix["has_prev"].shape == ()
    assert ("exp_avg_sq" in matrix) == (mars_type == "adamw")
    assert "exp_avg_sq" in vector  # the 1-D rule is AdamW under every type
    assert ("prev_grad" in matrix) == (mode == "approx")
    assert ("prev_param" in matrix) == ("prev_param" in vector) == (mode == "exact")
    assert "prev_grad" not in vector


@backends
@types
def test_gamma_zero_keeps_no_previous_gradient(backend: str, mars_type: str) -> None:
    parameters = make_parameters(("vector", "wide"))
    optimizer = MARS(parameters, mars_type=mars_type, gamma=0, **BACKENDS[backend])
    take_steps(optimizer, parameters, range(2))
    assert all("prev_grad" not in state for state in optimizer.state.values())


@backends
@types
@modes
@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2)], ids=["float", "tensor"])
@pytest.mark.parametrize("gamma", [0.3, schedules.Linear(0.1, 0.9, 4)], ids=["constant", "schedule"])
def test_materialising_step_only_creates_state(backend: str, mars_type: str, mode: str, lr: Any, gamma: Any) -> None:
    """Zero gradients at lr = 0 on tensors without state, as torch.distributed.checkpoint does it."""
    parameters = make_parameters(NAMES)
    others = clones(parameters)
    options: Options = {**SVD, "mars_type": mars_type, "is_approx": MODES[mode], **BACKENDS[backend]}
    options.update(gamma=gamma, weight_decay=0.1, lr=copy.copy(lr))
    materialised, fresh = MARS(parameters, **options), MARS(others, **options)
    problem = MinibatchQuadratic(parameters)

    for p in parameters:
        p.grad = torch.zeros_like(p)
    for group in materialised.param_groups:
        group["lr"] = torch.tensor(0.0) if torch.is_tensor(lr) else 0.0
    materialised.step(closure=None)
    for group in materialised.param_groups:
        group["lr"] = lr
    materialised.zero_grad(set_to_none=True)

    assert_same(parameters, others)
    for p in parameters:
        assert int(materialised.state[p]["step"]) == 0
        assert not bool(materialised.state[p].get("has_prev", False))
    take_steps(fresh, others, range(4), problem)
    for p, q in zip(parameters, others, strict=True):
        assert set(materialised.state[p]) == set(fresh.state[q])
    take_steps(materialised, parameters, range(4), problem)
    assert_same(parameters, others)
    assert_same_state(materialised, fresh)


# ------------------------------------------------------------------ who owns the gradient


@backends
@types
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}, {"maximize": True}, {"clip_norm": None}], ids=str)
@pytest.mark.parametrize("buffer", ["kept", "view of a bucket", "poisoned"])
def test_the_previous_gradient_is_a_value(backend: str, mars_type: str, options: Options, buffer: str) -> None:
    """zero_grad(set_to_none=False), DDP's buckets and memory that is written again give the same trajectory."""
    parameters = make_parameters(NAMES)
    others = clones(parameters)
    all_options: Options = {**SVD, "gamma": 0.3, "mars_type": mars_type, **BACKENDS[backend], **options}
    ours, fresh = MARS(parameters, **all_options), MARS(others, **all_options)
    problem = MinibatchQuadratic(parameters)
    bucket = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    ends = torch.tensor([p.numel() for p in parameters]).cumsum(0).tolist()
    views = [bucket[end - p.numel() : end].view(p.shape) for end, p in zip(ends, parameters, strict=True)]
    kept = views if buffer == "view of a bucket" else [torch.zeros_like(p) for p in parameters]
    for t in range(8):
        for p, g, keep in zip(parameters, problem.gradients([*parameters], t), kept, strict=True):
            if buffer == "poisoned":
                p.grad = g
            else:
                p.grad = keep
                keep.zero_()
                keep.add_(g)
        ours.step()
        held = [p.grad for p in parameters]
        if buffer == "poisoned":
            for g in held:
                if g is not None:
                    g.fill_(float("nan"))
        else:
            ours.zero_grad(set_to_none=False)
        problem.assign(others, t)
        fresh.step()
        fresh.zero_grad()
        assert_same(parameters, others)


@backends
@types
@modes
def test_step_leaves_the_gradient_as_it_was(backend: str, mars_type: str, mode: str) -> None:
    """Whoever reads p.grad after the step (logging, a second optimizer) sees what backward wrote, or None."""
    parameters = make_parameters(NAMES)
    options: Options = {"mars_type": mars_type, "is_approx": MODES[mode], **BACKENDS[backend]}
    optimizer = MARS(parameters, max_grad_norm=0.1, maximize=True, gamma=0.3, **options)
    problem = MinibatchQuadratic(parameters)
    for t in range(3):
        expected = problem.gradients([*parameters], t)
        optimizer.step(lambda t=t: problem.assign(parameters, t))
        for p, g in zip(parameters, expected, strict=True):
            assert p.grad is None or torch.equal(p.grad, g)


@types
@modes
def test_optimizer_in_backward(mars_type: str, mode: str) -> None:
    """One optimizer per tensor, stepped from the hook that sees the accumulated gradient."""
    if mode == "exact":
        pytest.skip("exact mode evaluates the whole model twice before any tensor may move")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    twin = copy.deepcopy(model)
    together = MARS(twin.parameters(), mars_type=mars_type, **SVD)
    for p in model.parameters():
        optimizer = MARS([p], mars_type=mars_type, **SVD)

        def hook(_: Tensor, optimizer: MARS = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        p.register_post_accumulate_grad_hook(hook)
    for _ in range(4):
        x = torch.randn(5, 3, dtype=torch.float64)
        model(x).square().mean().backward()
        twin(x).square().mean().backward()
        together.step()
        together.zero_grad()
        # Tensors of equal shape may share one batched factorisation, so equal to rounding only.
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, atol=1e-11, rtol=0)


# ------------------------------------------------------------------ checkpoints


def trained(dtype: torch.dtype, options: Options, num_steps: int = 3) -> tuple[MARS, list[Parameter]]:
    parameters = make_parameters(("vector", "wide", "conv"), dtype)
    optimizer = MARS(parameters, **options)
    take_steps(optimizer, parameters, range(num_steps))
    return optimizer, parameters


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@backends
@types
@modes
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_resume_is_bit_for_bit(backend: str, mars_type: str, mode: str, dtype: torch.dtype) -> None:
    """Half-precision parameters too: load_state_dict must not round their float32 state."""
    options: Options = {"mars_type": mars_type, "is_approx": MODES[mode], **BACKENDS[backend]}
    options.update(gamma=0.3, weight_decay=0.1, lr=0.05)
    optimizer, parameters = trained(dtype, options)
    others = clones(parameters)
    resumed = MARS(others, **options)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_same_state(optimizer, resumed)
    take_steps(optimizer, parameters, range(3, 6))
    take_steps(resumed, others, range(3, 6))
    assert_same(parameters, others)
    assert_same_state(optimizer, resumed)


@types
@modes
def test_float32_state_loads_under_bfloat16_parameters(mars_type: str, mode: str) -> None:
    options: Options = {"mars_type": mars_type, "is_approx": MODES[mode]}
    optimizer, parameters = trained(torch.float32, options)
    others = [Parameter(p.detach().bfloat16()) for p in parameters]
    resumed = MARS(others, **options)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    for p, q in zip(parameters, others, strict=True):
        for name in ("exp_avg", "exp_avg_sq", "prev_grad", "step"):
            if name in optimizer.state[p]:
                assert resumed.state[q][name].dtype == torch.float32
                assert torch.equal(resumed.state[q][name], optimizer.state[p][name])
    take_steps(resumed, others, range(3, 5))


def test_loading_copies(  # a state dict in memory may be loaded twice
) -> None:
    optimizer, parameters = trained(torch.float64, {})
    state_dict = optimizer.state_dict()
    kept = copy.deepcopy(state_dict)
    others = clones(parameters)
    resumed = MARS(others)
    resumed.load_state_dict(copy.deepcopy(state_dict))
    take_steps(resumed, others, range(3, 6))
    for key, state in kept["state"].items():
        for name, value in state.items():
            assert torch.equal(state_dict["state"][key][name], value)


@types
@modes
def test_pickling(mars_type: str, mode: str) -> None:
    options: Options = {"mars_type": mars_type, "is_approx": MODES[mode], "gamma": schedules.Linear(0.1, 0.5, 5)}
    optimizer, parameters = trained(torch.float64, options)
    revived = pickle.loads(pickle.dumps(optimizer))
    others = revived.param_groups[0]["params"]
    take_steps(optimizer, parameters, range(3, 6))
    take_steps(revived, others, range(3, 6))
    assert_same(parameters, others)
    assert_same_state(optimizer, revived)
    assert repr(optimizer) == repr(revived)


@types
@modes
def test_deepcopy(mars_type: str, mode: str) -> None:
    options: Options = {"mars_type": mars_type, "is_approx": MODES[mode], "gamma": schedules.Cosine(0.1, 0.5, 5)}
    optimizer, parameters = trained(torch.float64, options)
    twin, others = copy.deepcopy((optimizer, parameters))
    assert others[0] is not parameters[0]
    take_steps(twin, others, range(3, 6))
    before = [p.detach().clone() for p in parameters]
    assert_same(parameters, before)
    take_steps(optimizer, parameters, range(3, 6))
    assert_same(parameters, others)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mars_type", ["adamw", "m"])
def test_distributed_checkpoint_state_dict(mars_type: str, mode: str) -> None:
    """get_optimizer_state_dict and set_optimizer_state_dict, with the step by which they materialise state."""
    from torch.distributed.checkpoint import state_dict as dcp

    def build() -> tuple[nn.Module, MARS]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()
        return model, MARS(model.parameters(), mars_type=mars_type, is_approx=MODES[mode], gamma=0.3, lr=0.01, **SVD)

    def train(model: nn.Module, optimizer: MARS, steps: Sequence[int]) -> None:
        for t in steps:
            x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(t))

            def closure(x: Tensor = x) -> Tensor:
                optimizer.zero_grad()
                loss = model(x).square().mean()
                loss.backward()
                return loss

            optimizer.step(closure)

    model, optimizer = build()
    # Materialised before its first step, and not disturbed by it.
    empty = dcp.get_optimizer_state_dict(model, optimizer)
    assert all(float(s["step"]) == 0 for s in empty["state"].values())  # type: ignore[union-attr]
    train(model, optimizer, range(3))
    untouched_model, untouched = build()
    train(untouched_model, untouched, range(3))
    assert_same([*model.parameters()], [*untouched_model.parameters()])

    saved = dcp.get_state_dict(model, optimizer)
    other_model, other = build()
    dcp.set_state_dict(
        other_model, other, model_state_dict=copy.deepcopy(saved[0]), optim_state_dict=copy.deepcopy(saved[1])
    )
    assert_same_state(optimizer, other)
    train(model, optimizer, range(3, 6))
    train(other_model, other, range(3, 6))
    assert_same([*model.parameters()], [*other_model.parameters()])


@backends
@modes
@pytest.mark.parametrize(
    "gamma",
    [schedules.Linear(0.5, 0.1, 8), schedules.Cosine(0.5, 0.1, 8), schedules.Constant(0.2)],
    ids=lambda g: type(g).__name__,
)
def test_gamma_schedules_resume_exactly(backend: str, mode: str, gamma: Any) -> None:
    """The schedule itself is in the state dict, so the new optimizer needn't be told."""
    options: Options = {"is_approx": MODES[mode], **BACKENDS[backend]}
    optimizer, parameters = trained(torch.float64, {**options, "gamma": gamma}, num_steps=4)
    state_dict = through_a_file(optimizer.state_dict())
    assert isinstance(state_dict["param_groups"][0]["gamma"], dict)
    others = clones(parameters)
    resumed = MARS(others, **options)
    resumed.load_state_dict(state_dict)
    take_steps(optimizer, parameters, range(4, 10))
    take_steps(resumed, others, range(4, 10))
    assert_same(parameters, others)
    assert resumed.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


def one_over(step: float) -> float:
    return 0.4 / (1 + step)


def test_a_gamma_of_ones_own_resumes_when_given_again() -> None:
    """Code can't travel in a weights-only file; the step count, which it is a function of, does."""
    optimizer, parameters = trained(torch.float64, {"gamma": one_over}, num_steps=4)
    others = clones(parameters)
    resumed = MARS(others, gamma=one_over)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    take_steps(optimizer, parameters, range(4, 8))
    take_steps(resumed, others, range(4, 8))
    assert_same(parameters, others)


def test_gamma_as_a_tensor_is_saved_and_read_at_each_step() -> None:
    gamma = torch.tensor(0.3, dtype=torch.float64)
    optimizer, parameters = trained(torch.float64, {"gamma": gamma})
    others = clones(parameters)
    resumed = MARS(others)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    take_steps(optimizer, parameters, range(3, 5))
    take_steps(resumed, others, range(3, 5))
    assert_same(parameters, others)
    gamma.fill_(0.6)
    take_steps(optimizer, parameters, range(5, 7))
    take_steps(resumed, others, range(5, 7))
    assert not torch.equal(parameters[1], others[1])


def test_every_hyperparameter_is_in_the_state_dict_and_comes_back() -> None:
    options: Options = {
        "lr": 0.05,
        "betas": (0.8, 0.9),
        "eps": 1e-4,
        "weight_decay": 0.2,
        "amsgrad": True,
        "gamma": 0.3,
        "betas_1d": (0.7, 0.6),
        "lr_1d": 0.02,
        "weight_decay_1d": 0.4,
        "clip_norm": 0.5,
        "first_step": "zero",
        "maximize": True,
    }
    optimizer, parameters = trained(torch.float64, options)
    others = clones(parameters)
    resumed = MARS(others)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    take_steps(optimizer, parameters, range(3, 7))
    take_steps(resumed, others, range(3, 7))
    assert_same(parameters, others)


# ------------------------------------------------------------------ groups and models


@backends
@types
@modes
def test_add_param_group_in_mid_training(backend: str, mars_type: str, mode: str) -> None:
    """A group that joins later has its own first step; it is as if it had an optimizer of its own."""
    parameters = make_parameters(("vector", "wide", "tall"))
    oracle = Oracle(parameters, mars_type=mars_type, is_approx=MODES[mode], gamma=0.3, lr=1e-2)
    optimizer = MARS(
        parameters[:2],
        mars_type=mars_type,
        is_approx=MODES[mode],
        gamma=0.3,
        lr=1e-2,
        **BACKENDS[backend],
        **SVD,
    )
    problem = MinibatchQuadratic(parameters)
    for t in range(8):
        if t == 3:
            optimizer.add_param_group({"params": [parameters[2]]})
        present = [True, True, t >= 3]
        oracle.step(
            [g if keep else None for g, keep in zip(problem.gradients(oracle.x, t), present, strict=True)],
            problem.gradients(oracle.previous_weights(), t) if mode == "exact" else None,
        )
        optimizer.step(lambda t=t, present=present: problem.assign(parameters, t, present))
        for p, x in zip(parameters, oracle.x, strict=True):
            assert_close(p, x, atol=1e-9)


def test_add_param_group_checks_its_hyperparameters() -> None:
    parameters = make_parameters(("wide", "tall"))
    optimizer = MARS(parameters[:1])
    with pytest.raises(ValueError, match="gamma"):
        optimizer.add_param_group({"params": parameters[1:], "gamma": "fast"})


@types
def test_lr_1d_of_a_group_is_a_ratio(mars_type: str) -> None:
    """Given with the constructor or with a group; a scheduler moves both rates."""
    parameters = make_parameters(("vector", "strided_vector"))
    groups = [{"params": parameters[:1], "lr": 0.1, "lr_1d": 0.02}, {"params": parameters[1:]}]
    optimizer = MARS(groups, lr=0.1, lr_1d=0.05, mars_type=mars_type)
    assert [group["lr_1d_ratio"] for group in optimizer.param_groups] == pytest.approx([0.2, 0.5])
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    adamw = [
        torch.optim.AdamW([q], lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
        for q, lr in zip(clones(parameters), (0.002, 0.005), strict=True)
    ]
    for t in range(3):
        for p, theirs in zip(parameters, adamw, strict=True):
            q = theirs.param_groups[0]["params"][0]
            p.grad = torch.sin(torch.arange(5, dtype=torch.float64) + t)
            q.grad = p.grad.clone()
            theirs.step()
        optimizer.step()
        for p, theirs in zip(parameters, adamw, strict=True):
            torch.testing.assert_close(p, theirs.param_groups[0]["params"][0], atol=1e-13, rtol=0)


@backends
@types
@modes
def test_named_parameters(backend: str, mars_type: str, mode: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    twin = copy.deepcopy(model)
    options: Options = {"mars_type": mars_type, "is_approx": MODES[mode], **BACKENDS[backend]}
    by_name, plain = MARS(model.named_parameters(), **options), MARS(twin.parameters(), **options)
    assert by_name.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    take_steps(by_name, [*model.parameters()], range(3))
    take_steps(plain, [*twin.parameters()], range(3))
    assert_same([*model.parameters()], [*twin.parameters()])


class Tied(nn.Module):
    """One matrix, used as embedding and as head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4, dtype=torch.float64)
        self.head = nn.Linear(4, 6, bias=False, dtype=torch.float64)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens))


@backends
@types
@modes
def test_tied_parameters_take_one_step(backend: str, mars_type: str, mode: str) -> None:
    torch.manual_seed(0)
    model = Tied()
    optimizer = MARS(
        model.parameters(), lr=1e-2, mars_type=mars_type, is_approx=MODES[mode], **BACKENDS[backend], **SVD
    )
    oracle = Oracle([model.embedding.weight], lr=1e-2, mars_type=mars_type, is_approx=MODES[mode])
    tokens = torch.tensor([0, 3, 5, 1])

    def gradient(weight: Tensor) -> Tensor:
        leaf = weight.clone().requires_grad_()
        return torch.autograd.grad((leaf[tokens] @ leaf.T).square().mean(), leaf)[0]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(tokens).square().mean()
        loss.backward()
        return loss

    for _ in range(5):
        oracle.step([gradient(oracle.x[0])], [gradient(oracle.previous_weights()[0])])
        optimizer.step(closure)
        assert_close(model.head.weight, oracle.x[0], atol=1e-9)
    assert len(optimizer.state) == 1


@types
@modes
def test_freeze_and_thaw(mars_type: str, mode: str) -> None:
    """A frozen tensor keeps weights and state to the bit; thawed, it goes on from there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    optimizer = MARS(model.parameters(), mars_type=mars_type, is_approx=MODES[mode], lr=0.05, gamma=0.3)
    layer = model[2]
    assert isinstance(layer, nn.Linear)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(5, 3, dtype=torch.float64)).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    layer.requires_grad_(False)
    kept = layer.weight.detach().clone(), copy.deepcopy(dict(optimizer.state[layer.weight]))
    moved = model[0].weight.detach().clone()  # type: ignore[union-attr]
    for _ in range(3):
        optimizer.step(closure)
    assert torch.equal(layer.weight, kept[0])
    for name, value in kept[1].items():
        if name != "prev_param":  # a frozen tensor's previous weights are its weights
            assert torch.equal(optimizer.state[layer.weight][name], value), name
    assert not torch.equal(model[0].weight, moved)  # type: ignore[union-attr]
    layer.requires_grad_(True)
    optimizer.step(closure)
    assert int(optimizer.state[layer.weight]["step"]) == 4
    assert not torch.equal(layer.weight, kept[0])


def test_a_parameter_first_seen_late_starts_then() -> None:
    """ "First" is by tensor, not by the optimizer's age."""
    late, fresh = make_parameters(("wide",))[0], make_parameters(("wide",))[0]
    (early,) = make_parameters(("tall",))
    optimizer, own = MARS([early, late], gamma=0.5), MARS([fresh], gamma=0.5)
    for t in range(6):
        early.grad = torch.ones_like(early)
        if t >= 3:
            late.grad = torch.full_like(late, 0.01 * t)
            fresh.grad = torch.full_like(fresh, 0.01 * t)
            own.step()
        optimizer.step()
        assert torch.equal(late, fresh)


@types
@modes
def test_zero_size_and_scalar_tensors_alone(mars_type: str, mode: str) -> None:
    for name in ("scalar", "one", "empty_vector", "empty_matrix"):
        for foreach in (False, True):
            parameters = make_parameters((name,))
            optimizer = MARS(parameters, mars_type=mars_type, is_approx=MODES[mode], foreach=foreach, max_grad_norm=1.0)
            take_steps(optimizer, parameters, range(3))
            assert torch.isfinite(parameters[0]).all()


def test_no_parameters_with_gradients_at_all() -> None:
    parameters = make_parameters(NAMES)
    before = clones(parameters)
    for options in ({}, {"max_grad_norm": 1.0}, {"skip_nonfinite": True}):
        optimizer = MARS(parameters, **options)  # type: ignore[arg-type]
        optimizer.step()
        assert_same(parameters, before)
        assert optimizer.step(lambda: 3.0) == 3.0


@modes
def test_step_returns_the_loss(mode: str) -> None:
    """In exact mode the loss at x_t, not at x_{t-1}."""
    p = Parameter(torch.ones(2, 2, dtype=torch.float64))
    optimizer = MARS([p], is_approx=MODES[mode], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    for _ in range(4):
        here = p.detach().square().sum()
        torch.testing.assert_close(optimizer.step(closure), here)


def test_closure_runs_with_gradients_enabled() -> None:
    p = Parameter(torch.ones(2, 2))
    for is_approx in (True, False):
        optimizer = MARS([p], is_approx=is_approx)
        seen: list[bool] = []

        def closure(seen: list[bool] = seen) -> float:
            seen.append(torch.is_grad_enabled())
            p.grad = torch.ones_like(p)
            return 0.0

        with torch.no_grad():
            optimizer.step(closure)
            optimizer.step(closure)
        assert all(seen)


# ------------------------------------------------------------------ gradient scaler


def poison(parameters: Sequence[Tensor], which: int, value: float) -> None:
    gradient = parameters[which].grad
    assert gradient is not None
    gradient.view(-1)[0] = value


@backends
@types
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}], ids=str)
def test_grad_scaler_approx(backend: str, mars_type: str, options: Options) -> None:
    """A skipped step leaves weights, moments, step count, previous gradient and flag; the rest is unscaled."""
    parameters = make_parameters(("vector", "wide", "conv"), torch.float32)
    others = clones(parameters)
    all_options: Options = {**SVD, "mars_type": mars_type, "gamma": 0.3, **BACKENDS[backend], **options}
    optimizer, plain = MARS(parameters, **all_options), MARS(others, **all_options)
    problem = MinibatchQuadratic(parameters)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3)
    skipped = {0, 4, 5}
    for t in range(10):
        scale = scaler.get_scale()
        scaler.scale(torch.zeros(()))  # the scaler makes its scale tensor here
        problem.assign(parameters, t)
        for p in parameters:
            assert p.grad is not None
            p.grad.mul_(scale)
        before = snapshot(optimizer, parameters)
        if t in skipped:
            poison(parameters, 1, float("inf"))
        scaler.step(optimizer)
        scaler.update()
        if t in skipped:
            assert_unchanged(optimizer, parameters, before)
            assert scaler.get_scale() < scale
        else:
            problem.assign(others, t)
            plain.step()
        assert_same(parameters, others)
    assert_same_state(optimizer, plain)


@types
@pytest.mark.parametrize("overflow_at", [None, 2])
def test_grad_scaler_exact(mars_type: str, overflow_at: int | None) -> None:
    """The scale is taken out of both gradients; an overflow at x_{t-1} skips the step, counts it and backs off."""
    parameters = make_parameters(("vector", "wide"), torch.float32)
    others = clones(parameters)
    options: Options = {**SVD, "mars_type": mars_type, "is_approx": False, "gamma": 0.3, "lr": 0.05}
    optimizer, plain = MARS(parameters, **options), MARS(others, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)

    def loss(parameters: Sequence[Tensor], t: int) -> Tensor:
        return torch.stack([(p - 0.1 * t).square().sum() for p in parameters]).sum()

    for t in range(5):
        before = snapshot(optimizer, parameters)
        with optimizer.previous_params(scaler):
            scaled = scaler.scale(loss(parameters, t))
            (scaled * float("inf") if t == overflow_at else scaled).backward()
        scaler.scale(loss(parameters, t)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if t == overflow_at:
            assert_unchanged(optimizer, parameters, before)
            assert scaler.get_scale() == 2.0**7
        else:
            with plain.previous_params():
                loss(others, t).backward()
            loss(others, t).backward()
            plain.step()
            plain.zero_grad()
        assert_same(parameters, others)
    assert optimizer.num_skipped_steps == (0 if overflow_at is None else 1)


# ------------------------------------------------------------------ exact mode


def test_previous_params_has_its_place() -> None:
    """Not in approx mode, not inside itself, and no step inside it."""
    (p,) = make_parameters(("wide",))
    with pytest.raises(RuntimeError, match="is_approx"), MARS([p]).previous_params():
        pass
    optimizer = MARS([p], is_approx=False)
    with optimizer.previous_params():
        with pytest.raises(RuntimeError, match="previous_params"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="inside"), optimizer.previous_params():
            pass


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 16, dtype=torch.float64)
        self.second = nn.Linear(16, 2, dtype=torch.float64)
        self.masks: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.dropout(torch.ones_like(self.first(x)), 0.5)
        self.masks.append(hidden.detach().clone())
        return self.second(torch.tanh(self.first(x)) * hidden)


def step_with_closure(optimizer: MARS, loss: Callable[[], Tensor]) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


def step_with_context(optimizer: MARS, loss: Callable[[], Tensor]) -> None:
    with optimizer.previous_params():
        loss().backward()
    loss().backward()
    optimizer.step()
    optimizer.zero_grad()


two_ways = pytest.mark.parametrize("take_step", [step_with_closure, step_with_context])


@two_ways
@types
def test_both_evaluations_see_the_same_dropout(take_step: Callable[..., None], mars_type: str) -> None:
    """The first's RNG state is replayed in the second, and afterwards the stream has moved on once."""
    torch.manual_seed(0)
    model = Dropped()
    optimizer = MARS(model.parameters(), mars_type=mars_type, is_approx=False)
    x = torch.randn(8, 4, dtype=torch.float64)
    torch.manual_seed(1)
    last: Tensor | None = None
    for _ in range(4):
        model.masks.clear()
        take_step(optimizer, lambda: model(x).square().mean())
        assert len({mask.numpy().tobytes() for mask in model.masks}) == 1
        mask = model.masks[0]
        assert 0 < torch.count_nonzero(mask) < mask.numel()
        if last is not None:
            assert len(model.masks) == 2
            assert not torch.equal(mask, last)
        last = mask
    # One evaluation's draws per step, no more: the stream is where four draws leave it.
    after = torch.rand(3)
    torch.manual_seed(1)
    for _ in range(4):
        nn.functional.dropout(torch.ones(8, 16, dtype=torch.float64), 0.5)
    assert torch.equal(after, torch.rand(3))


@two_ways
@types
@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_first_evaluation_is_at_the_previous_weights(
    take_step: Callable[..., None], mars_type: str, backend: str, dtype: torch.dtype
) -> None:
    """To the bit, and x_t is back for the second."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype)
    optimizer = MARS(model.parameters(), mars_type=mars_type, is_approx=False, lr=0.05, **BACKENDS[backend])
    x = torch.randn(5, 3).to(dtype)
    seen: list[list[Tensor]] = []

    def loss() -> Tensor:
        seen.append([p.detach().clone() for p in model.parameters()])
        return model(x).square().mean()

    previous = [p.detach().clone() for p in model.parameters()]
    for t in range(4):
        here = [p.detach().clone() for p in model.parameters()]
        seen.clear()
        take_step(optimizer, loss)
        assert_same(seen[-1], here)
        if t > 0:
            assert len(seen) == 2
            assert_same(seen[0], previous)
        previous = here


def test_previous_params_clears_gradients_and_restores_weights() -> None:
    (p,) = make_parameters(("wide",))
    optimizer = MARS([p], is_approx=False, lr=0.1)
    for t in range(3):
        here, storage = p.detach().clone(), p.data_ptr()
        with optimizer.previous_params():
            inside = p.detach().clone()
            p.square().sum().backward()
        assert p.grad is None
        assert torch.equal(p, here)
        assert p.data_ptr() == storage
        assert torch.equal(inside, here) == (t == 0)
        p.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@types
def test_an_exception_in_previous_params_leaves_everything(mars_type: str) -> None:
    parameters = make_parameters(NAMES)
    others = clones(parameters)
    options: Options = {**SVD, "mars_type": mars_type, "is_approx": False, "gamma": 0.5, "lr": 0.05}
    optimizer, undisturbed = MARS(parameters, **options), MARS(others, **options)
    problem = MinibatchQuadratic(parameters)
    take_steps(optimizer, parameters, range(2), problem)
    take_steps(undisturbed, others, range(2), problem)
    optimizer.zero_grad()
    before = snapshot(optimizer, parameters)

    def fail() -> None:
        problem.assign(parameters, 99)
        raise KeyError("the data loader died")

    with pytest.raises(KeyError), optimizer.previous_params():
        fail()
    assert_unchanged(optimizer, parameters, before)
    assert all(p.grad is None for p in parameters)
    # The failed evaluation doesn't count: a step now still lacks one.
    problem.assign(parameters, 2)
    with pytest.raises(ValueError, match="previous_params"):
        optimizer.step()
    assert_unchanged(optimizer, parameters, before)
    optimizer.zero_grad()
    take_steps(optimizer, parameters, range(2, 5), problem)
    take_steps(undisturbed, others, range(2, 5), problem)
    assert_same(parameters, others)


@types
@pytest.mark.parametrize("failing_call", [1, 2])
def test_an_exception_in_the_closure_leaves_everything(mars_type: str, failing_call: int) -> None:
    parameters = make_parameters(NAMES)
    others = clones(parameters)
    options: Options = {**SVD, "mars_type": mars_type, "is_approx": False, "gamma": 0.5, "lr": 0.05}
    optimizer, undisturbed = MARS(parameters, **options), MARS(others, **options)
    problem = MinibatchQuadratic(parameters)
    take_steps(optimizer, parameters, range(2), problem)
    take_steps(undisturbed, others, range(2), problem)
    before = snapshot(optimizer, parameters)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        loss = problem.assign(parameters, 99)
        if calls == failing_call:
            raise KeyError("out of data")
        return loss

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert calls == failing_call
    assert_unchanged(optimizer, parameters, before)
    optimizer.zero_grad()
    take_steps(optimizer, parameters, range(2, 5), problem)
    take_steps(undisturbed, others, range(2, 5), problem)
    assert_same(parameters, others)


def test_an_evaluation_serves_one_step() -> None:
    (p,) = make_parameters(("wide",))
    optimizer = MARS([p], is_approx=False)
    for _ in range(2):
        with optimizer.previous_params():
            p.square().sum().backward()
        p.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    p.square().sum().backward()
    with pytest.raises(ValueError, match="previous_params"):
        optimizer.step()


@types
def test_accumulation_in_exact_mode(mars_type: str) -> None:
    """Two half batches, in the context and out of it, equal one whole."""
    results = []
    for parts in (1, 2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        optimizer = MARS(model.parameters(), mars_type=mars_type, is_approx=False, gamma=0.5, lr=0.02, **SVD)

        def backward(x: Tensor, parts: int = parts, model: nn.Module = model) -> None:
            for chunk in x.chunk(parts):
                (model(chunk).square().mean() / parts).backward()

        for t in range(4):
            x = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
            with optimizer.previous_params():
                backward(x)
            backward(x)
            optimizer.step()
            optimizer.zero_grad()
        results.append([p.detach() for p in model.parameters()])
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, atol=1e-10, rtol=0)


@two_ways
def test_zero_first_step_in_exact_mode_ignores_the_first_evaluation(take_step: Callable[..., None]) -> None:
    (p,) = make_parameters(("wide",))
    optimizer = MARS([p], is_approx=False, first_step="zero", gamma=0.3, clip_norm=None, betas=(0.9, 0.99))
    gradient = 2 * p.detach().clone()
    take_step(optimizer, lambda: p.square().sum())
    expected = 0.1 * (1 + 0.3 * 0.9 / 0.1) * gradient
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], expected, atol=1e-12, rtol=0)


def test_exact_gamma_zero_needs_no_second_evaluation() -> None:
    (p,) = make_parameters(("wide",))
    optimizer = MARS([p], is_approx=False, gamma=0)
    for _ in range(3):
        p.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert int(optimizer.state[p]["step"]) == 3


def test_exact_mode_in_bfloat16_autocast() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = MARS(model.parameters(), is_approx=False, lr=0.02, gamma=0.5)
    x = torch.randn(16, 4)

    def loss() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(x)
        return (out.float() - 1).square().mean()

    first = loss().item()
    for _ in range(20):
        step_with_context(optimizer, loss)
    assert loss().item() < first


# ------------------------------------------------------------------ no host synchronisation


class NoHostSync(TorchDispatchMode):
    """Fails on anything that would read a tensor's value on the host; the scalars that live there are given."""

    def __init__(self, host_scalars: Sequence[Tensor]):
        super().__init__()
        self.allowed = {scalar.data_ptr() for scalar in host_scalars}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "_unique2") and (
            args[0].data_ptr() not in self.allowed
        ):
            raise AssertionError(f"host synchronisation: {func} on a tensor of shape {tuple(args[0].shape)}")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_host_sync(optimizer: MARS) -> Iterator[None]:
    """Step counts and first-step flags are kept on the CPU for this very purpose; test_step_on_the_meta_device
    shows that they are all that is read.
    """
    scalars = [state[name] for state in optimizer.state.values() for name in ("step", "has_prev") if name in state]
    assert all(scalar.device.type == "cpu" and scalar.ndim == 0 for scalar in scalars)
    with NoHostSync(scalars):
        yield


SYNC_OPTIONS: list[Options] = [
    {},
    {"max_grad_norm": 1.0},
    {"maximize": True, "amsgrad": True},
    {"first_step": "zero", "clip_norm": None},
    {"optimize_1d": True},
    {"gamma": schedules.Linear(0.1, 0.5, 10)},
]


@backends
@types
@modes
@pytest.mark.parametrize("options", SYNC_OPTIONS, ids=lambda o: "-".join(o) or "defaults")
def test_step_reads_no_tensor_on_the_host(backend: str, mars_type: str, mode: str, options: Options) -> None:
    if backend == "native":
        pytest.skip("the host is where it computes")
    parameters = make_parameters(NAMES, torch.float32)
    optimizer = MARS(parameters, mars_type=mars_type, is_approx=MODES[mode], **BACKENDS[backend], **options)
    gradients = [[torch.randn_like(p) for p in parameters] for _ in range(3)]
    # State is made on the first step; its counters are known from then on, so that step is checked on "meta".
    for t, step_gradients in enumerate(gradients):

        def closure(step_gradients: list[Tensor] = step_gradients) -> float:
            for p, g in zip(parameters, step_gradients, strict=True):
                p.grad = g
            return 0.0

        if t == 0:
            optimizer.step(closure)
        else:
            with no_host_sync(optimizer):
                optimizer.step(closure)


@backends
@types
@modes
@pytest.mark.parametrize("options", SYNC_OPTIONS, ids=lambda o: "-".join(o) or "defaults")
def test_step_on_the_meta_device(backend: str, mars_type: str, mode: str, options: Options) -> None:
    """A meta tensor has no values: .item() and bool() on it raise."""
    if backend == "native":
        pytest.skip("meta tensors have no memory to work on; fused=True refuses them (test_torch_checks)")
    parameters = [Parameter(torch.empty(s, device="meta")) for s in [(), (3,), (3, 4), (4, 3), (2, 3, 2, 2)]]
    optimizer = MARS(parameters, mars_type=mars_type, is_approx=MODES[mode], **BACKENDS[backend], **options)

    def closure() -> float:
        for p in parameters:
            p.grad = torch.empty_like(p)
        return 0.0

    for _ in range(3):
        optimizer.step(closure)
    assert all(s.get("exp_avg", s.get("exp_avg_grad")).is_meta for s in optimizer.state.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@types
@modes
def test_step_under_cuda_sync_debug_mode(mars_type: str, mode: str) -> None:
    parameters = [Parameter(torch.randn(s, device="cuda")) for s in [(), (3,), (3, 4), (4, 3), (2, 3, 2, 2)]]
    optimizer = MARS(parameters, mars_type=mars_type, is_approx=MODES[mode], max_grad_norm=1.0)

    def closure() -> float:
        for p in parameters:
            p.grad = torch.ones_like(p)
        return 0.0

    optimizer.step(closure)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step(closure)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ------------------------------------------------------------------ non-finite gradients on the default path


@backends
@pytest.mark.parametrize("mars_type", ELEMENTWISE)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_gradients_give_what_ieee_gives(backend: str, mars_type: str, value: float) -> None:
    """No crash, no skip: where a NaN goes in, a NaN comes out; other tensors go on."""
    parameters = make_parameters(("wide", "tall"))
    optimizer = MARS(parameters, mars_type=mars_type, **BACKENDS[backend], lr=0.1)
    before = parameters[1].detach().clone()
    for p in parameters:
        p.grad = torch.ones_like(p)
    poison(parameters, 0, value)
    optimizer.step()
    assert torch.isnan(optimizer.state[parameters[0]]["exp_avg"]).any()
    assert torch.isnan(parameters[0]).any() or mars_type == "lion"  # torch.sign(nan) is 0
    assert torch.isfinite(parameters[1]).all()
    assert not torch.equal(parameters[1], before)


@backends
@pytest.mark.parametrize("method", ["newton-schulz", "svd"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_gradients_stay_in_their_matrix(backend: str, method: str, value: float) -> None:
    """Equal shapes share a batched factorisation; a NaN in one mustn't reach the other, nor raise."""
    parameters = [Parameter(torch.ones(3, 4)) for _ in range(2)]
    optimizer = MARS(parameters, mars_type="m", **BACKENDS[backend], polar_method=method, lr=0.1)
    for p in parameters:
        p.grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    poison(parameters, 0, value)
    optimizer.step()
    assert not torch.isfinite(parameters[0]).all()
    assert torch.isfinite(parameters[1]).all()
    assert not torch.equal(parameters[1], torch.ones(3, 4))


@types
def test_gamma_schedule_counts_from_zero(mars_type: str) -> None:
    """gamma_t is f(t-1): the first correction, at t = 2, uses f(1)."""
    (p,) = make_parameters(("wide",))
    seen = linear(0.0, 1.0, 4)
    optimizer = MARS(
        [p], mars_type=mars_type, gamma=schedules.Linear(0.0, 1.0, 4), clip_norm=None, betas=(0.5, 0.5), **SVD
    )
    m, last = torch.zeros_like(p), torch.zeros_like(p)
    for t in range(6):
        g = torch.full_like(p, 1.0 + t)
        p.grad = g.clone()
        optimizer.step()
        # beta/(1-beta) = 1
        m = 0.5 * m + 0.5 * (g + (seen(t) * (g - last) if t else 0.0))
        last = g
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], m, atol=1e-13, rtol=0)
