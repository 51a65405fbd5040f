"""Properties over random shapes, hyperparameters and gradient patterns. Derandomized: the same examples each run."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

from mars_optim import MARS, polar_factor, schedules
from oracle import Oracle, Settings, polar, real
from problems import POLAR, TYPES

quick = settings(
    derandomize=True,
    deadline=None,
    max_examples=40,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)

shapes = st.lists(st.integers(0, 4), min_size=0, max_size=4).map(tuple)
lists_of_shapes = st.lists(shapes, min_size=1, max_size=4)
beta = st.floats(0.0, 0.99)
hyperparameters = st.fixed_dictionaries(
    {
        "lr": st.floats(1e-4, 0.5),
        "betas": st.tuples(beta, beta),
        "eps": st.floats(1e-8, 1e-2),
        "weight_decay": st.floats(0.0, 0.5),
        "gamma": st.floats(0.0, 1.0),
        "clip_norm": st.none() | st.floats(1e-2, 10.0),
        "first_step": st.sampled_from(["paper", "zero"]),
        "optimize_1d": st.booleans(),
        "betas_1d": st.tuples(beta, beta),
        "lr_1d": st.none() | st.floats(0.0, 0.5),
        "weight_decay_1d": st.none() | st.floats(0.0, 0.5),
        "max_grad_norm": st.none() | st.floats(0.1, 5.0),
        "maximize": st.booleans(),
        "amsgrad": st.booleans(),
    }
)
# What the gradient of one tensor is at one step.
kinds_of_gradient = st.sampled_from(["random", "random", "none", "zero"])
NUM_STEPS = 4


def parameters_of(all_shapes: list[tuple[int, ...]], seed: int = 0) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(s, dtype=torch.float64, generator=generator)) for s in all_shapes]


def gradient(kind: str, like: Tensor, t: int, i: int) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "zero":
        return torch.zeros_like(like)
    value = torch.randn(like.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(100 * t + i))
    if kind in ("nan", "inf") and value.numel():
        value.view(-1)[-1] = float(kind)
    return value


def optimizer_of(parameters: Any, mars_type: str, **options: Any) -> MARS:
    return MARS(parameters, mars_type=mars_type, polar_method="svd", polar_dtype=torch.float64, **options)


def assign(parameters: list[Parameter], gradients: list[Tensor | None]) -> None:
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = None if g is None else g.clone()


def patterns(kinds: st.SearchStrategy[str] = kinds_of_gradient) -> st.SearchStrategy[list[list[str]]]:
    row = st.lists(kinds, min_size=4, max_size=4)
    return st.lists(row, min_size=NUM_STEPS, max_size=NUM_STEPS)


@quick
@given(lists_of_shapes, hyperparameters, patterns(), st.sampled_from(TYPES), st.booleans(), st.booleans())
def test_the_library_is_the_oracle(
    all_shapes: list[tuple[int, ...]],
    options: dict[str, Any],
    pattern: list[list[str]],
    mars_type: str,
    is_approx: bool,
    foreach: bool,
) -> None:
    """Any shapes, any settings, gradients that come, go and vanish.

    Exact mode gets the gradients of a second random stream at x_{t-1}, and none where none is at x_t. An entry of
    m that is zero but for rounding has no defined sign or direction; after zero gradients that is exactly 0 here.
    """
    parameters = parameters_of(all_shapes)
    optimizer = optimizer_of(parameters, mars_type, is_approx=is_approx, foreach=foreach, **options)
    oracle = Oracle(parameters, Settings(mars_type=mars_type, is_approx=is_approx, **options))
    for t, row in enumerate(pattern):
        here = [gradient(row[i], p, t, i) for i, p in enumerate(parameters)]
        there = [gradient(row[i], p, 50 + t, i) for i, p in enumerate(parameters)]
        if not is_approx:
            # An x_{t-1} exists from a tensor's second step on; before it, nothing there is used.
            with optimizer.previous_params():
                assign(parameters, there)
        assign(parameters, here)
        optimizer.step()
        oracle.step(here, None if is_approx else there)
        for p, x in zip(parameters, oracle.x, strict=True):
            torch.testing.assert_close(real(p), x, atol=1e-7, rtol=1e-7)


@quick
@given(
    lists_of_shapes,
    hyperparameters,
    patterns(st.sampled_from(["random", "none", "nan", "inf"])),
    st.sampled_from(TYPES),
)
def test_skip_nonfinite_takes_only_the_finite_steps(
    all_shapes: list[tuple[int, ...]], options: dict[str, Any], pattern: list[list[str]], mars_type: str
) -> None:
    parameters = parameters_of(all_shapes)
    optimizer = optimizer_of(parameters, mars_type, skip_nonfinite=True, **options)
    oracle = Oracle(parameters, Settings(mars_type=mars_type, **options))
    for t, row in enumerate(pattern):
        gradients = [gradient(row[i], p, t, i) for i, p in enumerate(parameters)]
        assign(parameters, gradients)
        optimizer.step()
        if all(g is None or bool(torch.isfinite(g).all()) for g in gradients):
            oracle.step(gradients)
        for p, x in zip(parameters, oracle.x, strict=True):
            torch.testing.assert_close(real(p), x, atol=1e-7, rtol=1e-7)


@quick
@given(
    lists_of_shapes,
    hyperparameters,
    patterns(st.sampled_from(["random", "none", "zero", "nan", "inf"])),
    st.sampled_from(["adamw", "lion"]),
    st.booleans(),
)
def test_nonfinite_gradients_never_crash(
    all_shapes: list[tuple[int, ...]], options: dict[str, Any], pattern: list[list[str]], mars_type: str, foreach: bool
) -> None:
    parameters = parameters_of(all_shapes)
    optimizer = optimizer_of(parameters, mars_type, foreach=foreach, **options)
    for t, row in enumerate(pattern):
        assign(parameters, [gradient(row[i], p, t, i) for i, p in enumerate(parameters)])
        optimizer.step()


@quick
@given(lists_of_shapes, hyperparameters, patterns(), st.sampled_from(TYPES), st.integers(0, 100))
def test_order_and_grouping_do_not_matter(
    all_shapes: list[tuple[int, ...]], options: dict[str, Any], pattern: list[list[str]], mars_type: str, seed: int
) -> None:
    """One group in any order, or a group for each tensor."""
    together, apart = parameters_of(all_shapes), parameters_of(all_shapes)
    order = torch.randperm(len(all_shapes), generator=torch.Generator().manual_seed(seed)).tolist()
    one = optimizer_of([together[i] for i in order], mars_type, **options)
    many = optimizer_of([{"params": [p]} for p in apart], mars_type, **options)
    for t, row in enumerate(pattern):
        gradients = [gradient(row[i], p, t, i) for i, p in enumerate(together)]
        assign(together, gradients)
        assign(apart, gradients)
        one.step()
        many.step()
    for p, q in zip(together, apart, strict=True):
        torch.testing.assert_close(p, q, atol=1e-7, rtol=1e-7)


@quick
@given(lists_of_shapes, hyperparameters, patterns(st.sampled_from(["random", "none"])), st.integers(-8, 8))
def test_sign_and_polar_see_no_length(
    all_shapes: list[tuple[int, ...]], options: dict[str, Any], pattern: list[list[str]], exponent: int
) -> None:
    """Unclipped, lion and polar updates don't change when all gradients are multiplied by a power of two."""
    options = {**options, "clip_norm": None, "max_grad_norm": None}
    matrices = [s for s in all_shapes if len(s) >= 2]
    for mars_type in ("lion", "m"):
        plain, scaled = parameters_of(matrices), parameters_of(matrices)
        if not matrices:
            continue
        left, right = optimizer_of(plain, mars_type, **options), optimizer_of(scaled, mars_type, **options)
        for t, row in enumerate(pattern):
            gradients = [gradient(row[i], p, t, i) for i, p in enumerate(plain)]
            assign(plain, gradients)
            assign(scaled, [None if g is None else g * 2.0**exponent for g in gradients])
            left.step()
            right.step()
        for p, q in zip(plain, scaled, strict=True):
            torch.testing.assert_close(p, q, atol=1e-7, rtol=1e-7)


@quick
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 6), st.floats(-3, 3), st.integers(0, 1000))
def test_polar_factor_of_any_matrix(rows: int, cols: int, rank: int, log_scale: float, seed: int) -> None:
    """U V^T over the nonzero singular values, at any rank and any length; Newton-Schulz to 1.1%."""
    rank = min(rank, rows, cols)
    generator = torch.Generator().manual_seed(seed)
    U, _ = torch.linalg.qr(torch.randn(rows, rows, dtype=torch.float64, generator=generator))
    V, _ = torch.linalg.qr(torch.randn(cols, cols, dtype=torch.float64, generator=generator))
    S = torch.linspace(1.0, 0.2, rank, dtype=torch.float64)
    M = 10**log_scale * (U[:, :rank] * S) @ V[:, :rank].T
    torch.testing.assert_close(polar(M), U[:, :rank] @ V[:, :rank].T, atol=1e-9, rtol=0)
    by_svd = polar_factor(M, method="svd", dtype=torch.float64)
    torch.testing.assert_close(by_svd, polar(M), atol=1e-9, rtol=0)
    iterated = polar_factor(M, method="newton-schulz", coefficients="polar-express", steps=6, dtype=torch.float64)
    assert float((iterated - polar(M)).abs().max()) < 0.011


@quick
@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 20))
def test_schedules(start: float, end: float, num_steps: int) -> None:
    """Start at `start`, end and stay at `end`, stay between, and survive their own plain form."""
    low, high = min(start, end), max(start, end)
    for schedule in (schedules.Linear(start, end, num_steps), schedules.Cosine(start, end, num_steps)):
        values = [schedule(t) for t in range(num_steps + 5)]
        assert abs(values[0] - start) < 1e-12
        assert all(abs(v - end) < 1e-12 for v in values[num_steps:])
        assert all(low - 1e-12 <= v <= high + 1e-12 for v in values)
        steps = [b - a for a, b in itertools.pairwise(values)]
        assert all(s * (end - start) >= -1e-12 for s in steps)
    assert [schedules.Constant(start)(t) for t in (0, 7)] == [start, start]


@quick
@given(st.sampled_from(POLAR), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_unclipped_polar_step_has_the_length_its_scale_says(mars_type: str, rows: int, cols: int, seed: int) -> None:
    """||x_2 - x_1||_F = lr * scale * sqrt(rank), whatever the gradient: RMS 0.2 for `m` at full rank."""
    p = Parameter(torch.zeros(rows, cols, dtype=torch.float64))
    p.grad = torch.randn(rows, cols, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    optimizer_of([p], mars_type, lr=1.0, clip_norm=None).step()
    rank = min(rows, cols)
    expected = 0.2 * (rows * cols) ** 0.5 if mars_type == "m" else (max(1.0, rows / cols) * rank) ** 0.5
    torch.testing.assert_close(float(p.detach().norm()), expected, atol=1e-9, rtol=0)
