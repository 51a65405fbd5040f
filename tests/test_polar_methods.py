"""Every method of the polar factor: accuracy by dtype and spectrum, invariances, coefficients, the sketch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mars_optim import MARS, polar_factor
from mars_optim.polar import (
    PolarMethod,
    polar_express,
    polar_factors,
    polar_sketch,
    register_update_scale,
    symmetric,
)
from mars_optim.polar.newton_schulz import cheaper_form, newton_schulz, quintic_stages, segments
from mars_optim.polar.squaring import DEGREE_17, by_squaring
from mars_optim.polar.symmetric import symmetric_product
from mars_optim.polar.views import UPDATE_SCALES

EPS = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
DENSE = ["svd", "newton", "qdwh"]
ITERATED: list[dict[str, Any]] = [{"form": "standard"}, {"form": "gram"}]


def oracle(matrix: Tensor) -> Tensor:
    """U V^T by numpy in float64."""
    u, _, vh = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    return torch.from_numpy(u @ vh)


def orthogonal(n: int, m: int, seed: int) -> Tensor:
    """Orthonormal columns, shape (n, m) with n >= m, by numpy."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, m)))
    return torch.from_numpy(q)


def of_spectrum(sigma: Tensor, columns: int, seed: int = 0) -> Tensor:
    """Return a matrix (len(sigma), columns) with these singular values, Frobenius norm 1."""
    n = len(sigma)
    return orthogonal(n, n, seed) @ torch.diag(sigma / sigma.norm()) @ orthogonal(columns, n, seed + 1).T


def spike(n: int, count: int) -> Tensor:
    """`count` equal large values; all others are 3e-3 of the Frobenius norm."""
    sigma = torch.full((n,), 3e-3, dtype=torch.float64)
    sigma[:count] = math.sqrt((1 - (n - count) * 9e-6) / count)
    return sigma


SPECTRA = {
    "flat": torch.ones(256, dtype=torch.float64),
    "geometric": torch.logspace(0, -1.3, 256, dtype=torch.float64),
    "one large": spike(256, 1),
    "ten large": spike(256, 10),
    "power law": (1 / torch.arange(1.0, 257, dtype=torch.float64)).clamp(min=4e-3),
}


@pytest.fixture(params=["native products", "torch's products"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no native kernel the two are the same."""
    if request.param == "torch's products":
        monkeypatch.setattr(symmetric, "takes", lambda *_: False)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("kind", [*ITERATED, {"coefficients": "degree-17"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_singular_values_stay_in_their_band(spectrum: str, dtype: torch.dtype, kind: dict[str, Any]) -> None:
    # The claims of the documentation for 256 rows or more: of six Polar Express steps, and of degree 17.
    matrix = of_spectrum(SPECTRA[spectrum], 640)
    assert torch.linalg.svdvals(matrix)[-1] >= 2.99e-3
    sigma = torch.linalg.svdvals(polar_factor(matrix, dtype=dtype, **kind))
    assert (sigma - 1).abs().max() <= _bound(dtype, kind)


def _bound(dtype: torch.dtype, kind: dict[str, Any]) -> float:
    if dtype in (torch.bfloat16, torch.float16):
        return 0.03
    return 5e-3 if "coefficients" in kind else 1e-3


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alike", [False, True], ids=["random direction", "entries alike"])
@pytest.mark.parametrize("ratio", [14, 25, 35, 45, 55, 66, 76])
@pytest.mark.parametrize("kind", [{"form": "gram"}, {"coefficients": "degree-17"}], ids=str)
def test_one_direction_far_above_the_others_stays_in_the_band(
    kind: dict[str, Any], ratio: int, alike: bool, dtype: torch.dtype
) -> None:
    """What the mean of a gradient is to its rest. Entries that are alike are all rounded to the same side."""
    matrix = one_direction(256, 1024, ratio, alike=alike)
    out = torch.linalg.svdvals(polar_factor(matrix, dtype=dtype, **kind))
    assert (out - 1).abs().max() <= _bound(dtype, kind)


def test_a_large_direction_of_alike_entries_in_a_large_matrix() -> None:
    matrix = one_direction(768, 3072, 150, alike=True)
    out = torch.linalg.svdvals(polar_factor(matrix, dtype=torch.bfloat16))
    assert (out - 1).abs().max() <= 0.03


def one_direction(rows: int, columns: int, ratio: int, *, alike: bool) -> Tensor:
    """Return a matrix with one singular value `ratio` times the others."""
    u, v = orthogonal(rows, rows, 0), orthogonal(columns, rows, 1)
    if alike:
        u[:, 0], v[:, 0] = 1, 1
        u, v = torch.linalg.qr(u)[0], torch.linalg.qr(v)[0]
    sigma = torch.ones(rows, dtype=torch.float64)
    sigma[0] = ratio
    return u @ torch.diag(sigma) @ v.T


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_seven_steps_in_bfloat16(spectrum: str) -> None:
    matrix = of_spectrum(SPECTRA[spectrum], 640)
    sigma = torch.linalg.svdvals(polar_factor(matrix, steps=7, dtype=torch.bfloat16, form="gram"))
    assert (sigma - 1).abs().max() <= 0.03


def _from(x: Tensor, first: int) -> list[Tensor]:
    """Return x after none, one, ... of the polynomials from number `first` on, written out in powers of x."""
    values = [x]
    for a, b, d, e, f, g, h in DEGREE_17[first:]:
        x = values[-1]
        v = a * x**4 + b * x**2 + d
        w = v**2 + e * x**2 + f
        values.append(x * (w**2 + g * x**2 + h))
    return values


def test_the_bands_of_degree_17_are_those_of_the_documentation() -> None:
    start, *bands = _from(torch.logspace(math.log10(3e-3), 0, 200_001, dtype=torch.float64), 0)
    assert start[0] == pytest.approx(3e-3)
    assert (bands[-1] - 1).abs().max() <= 0.0022
    # What rounding does harms no more: errors of 0.3 and 0.25 parts of the singular value, and margins at both ends.
    low, high = (bands[0] - 0.3 * start).min() / 1.1, (bands[0] + 0.3 * start).max() * 1.1
    x, second, _ = _from(torch.linspace(low.item(), high.item(), 200_001, dtype=torch.float64), 1)
    noise = 0.25 * x / high
    low, high = (second - noise).min() / 1.05, (second + noise).max() * 1.05
    _, third = _from(torch.linspace(low.item(), high.item(), 200_001, dtype=torch.float64), 2)
    assert (third - 1).abs().max() <= 0.0022


@pytest.mark.parametrize("shape", [(20, 33), (33, 20), (3, 20, 33)], ids=str)
def test_degree_17_applies_its_polynomials_to_the_singular_values(shape: tuple[int, ...]) -> None:
    matrix = torch.from_numpy(np.random.default_rng(0).standard_normal(shape))
    matrix /= matrix.norm(dim=(-2, -1), keepdim=True)
    u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
    factor = polar_factor(matrix, coefficients="degree-17")
    torch.testing.assert_close(factor, u * _from(sigma, 0)[-1][..., None, :] @ vh, rtol=0, atol=1e-12)
    scalar, rest = by_squaring(matrix @ matrix.mT, DEGREE_17[0])
    x = scalar * matrix + rest @ matrix
    torch.testing.assert_close(x, u * _from(sigma, 0)[1][..., None, :] @ vh, rtol=0, atol=1e-12)


def test_what_is_chosen_when_nothing_is_said() -> None:
    degree, six = PolarMethod(coefficients="degree-17"), PolarMethod(coefficients="polar-express")
    for rows, dtype, same in (
        (256, torch.bfloat16, degree),
        (256, torch.float16, degree),
        (255, torch.bfloat16, six),
        (256, torch.float32, six),
        (512, torch.float64, six),
    ):
        matrix = torch.from_numpy(np.random.default_rng(0).standard_normal((rows, 600))).to(dtype)
        (chosen,), (expected,) = (polar_factors([matrix], replace(how, dtype=dtype)) for how in (PolarMethod(), same))
        assert torch.equal(chosen, expected)
    matrix = torch.from_numpy(np.random.default_rng(0).standard_normal((256, 600))).to(torch.bfloat16)
    by_hand: list[dict[str, Any]] = [{"steps": 6}, {"form": "gram"}]
    for asked in by_hand:
        given, expected = polar_factor(matrix, **asked), polar_factor(matrix, coefficients="polar-express")
        assert torch.equal(given, expected)
    for name, steps in (("jordan", 5), ("you", 5), ("polar-express", 6)):
        assert torch.equal(
            polar_factor(matrix, coefficients=name), polar_factor(matrix, coefficients=name, steps=steps)
        )


@pytest.mark.parametrize("kind", [{"steps": 4}, {"form": "gram"}])
def test_the_polynomials_of_degree_17_belong_together(kind: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="polar_coefficients='degree-17' are 3 polynomials that belong together"):
        polar_factor(torch.ones(3, 3), coefficients="degree-17", **kind)


@pytest.mark.parametrize("method", DENSE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e5])
def test_factorisations_are_accurate_to_the_condition(method: str, dtype: torch.dtype, condition: float) -> None:
    sigma = torch.logspace(0, -math.log10(condition), 24, dtype=torch.float64)
    matrix = of_spectrum(sigma, 40).to(dtype)
    factor = polar_factor(matrix, method)
    # The factor itself moves by 2 eps ||M|| / sigma_min; orthonormality does not depend on the condition.
    torch.testing.assert_close(factor.double(), oracle(matrix), rtol=0, atol=50 * EPS[dtype] * condition)
    identity = torch.eye(24, dtype=torch.float64)
    torch.testing.assert_close(factor.double() @ factor.double().T, identity, rtol=0, atol=100 * EPS[dtype])


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    exponent=st.integers(-30, 30),
    method=st.sampled_from([*DENSE, "newton-schulz"]),
)
def test_invariances_in_float64(rows: int, columns: int, seed: int, exponent: int, method: str) -> None:
    sigma = torch.linspace(1, 0.2, min(rows, columns), dtype=torch.float64)
    n = len(sigma)
    matrix = orthogonal(rows, n, seed) @ torch.diag(sigma) @ orthogonal(columns, n, seed + 1).T
    kind: dict[str, Any] = {"method": method, "steps": 12}
    factor = polar_factor(matrix, **kind)
    tight: dict[str, Any] = {"rtol": 0, "atol": 1e-13 * max(rows, columns)}  # condition 5, a few dozen roundings
    torch.testing.assert_close(factor, oracle(matrix), **tight)
    torch.testing.assert_close(polar_factor(matrix * 10.0**exponent, **kind), factor, **tight)
    torch.testing.assert_close(polar_factor(matrix.T, **kind), factor.T, **tight)
    q = orthogonal(rows, rows, seed + 2)
    torch.testing.assert_close(polar_factor(q @ matrix, **kind), q @ factor, **tight)
    torch.testing.assert_close(polar_factor(factor, **kind), factor, **tight)


@pytest.mark.parametrize("way", [*ITERATED, {}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(256, 640), (640, 256), (300, 300)], ids=str)
def test_invariances_in_low_precision(shape: tuple[int, int], dtype: torch.dtype, way: dict[str, Any]) -> None:
    # A Gaussian matrix of these shapes has sigma_min >= 1e-3 of the norm only when rectangular; make it so.
    matrix = torch.from_numpy(np.random.default_rng(0).standard_normal(shape)).float()
    matrix[: min(shape), : min(shape)] += 20 * torch.eye(min(shape))
    kind: dict[str, Any] = {"dtype": dtype, **way}
    factor = polar_factor(matrix, **kind)
    bound = 0.03 if dtype == torch.bfloat16 else 1e-4
    norm = math.sqrt(min(shape))
    assert (factor.double() - oracle(matrix)).norm() <= bound * norm
    assert (polar_factor(matrix.T, **kind) - factor.T).norm() <= bound * norm
    assert (polar_factor(1e-30 * matrix, **kind) - factor).norm() <= bound * norm
    assert (polar_factor(1e30 * matrix, **kind) - factor).norm() <= bound * norm
    assert (polar_factor(factor, **kind) - factor).norm() <= bound * norm
    q = orthogonal(shape[0], shape[0], 1).float()
    assert (polar_factor(q @ matrix, **kind) - q @ factor).norm() <= bound * norm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", [*DENSE, "newton-schulz"])
def test_input_of_every_dtype_comes_back_in_it(dtype: torch.dtype, method: str) -> None:
    matrix = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 9))).to(dtype)
    factor = polar_factor(matrix, method)
    assert factor.dtype == dtype
    bound = 4 * EPS[dtype] + (2e-3 if method == "newton-schulz" else 0) + 1e-5
    torch.testing.assert_close(factor.double(), oracle(matrix), rtol=0, atol=bound)
    signs = torch.from_numpy(np.random.default_rng(1).choice([-1.0, 1.0], (20, 50)))
    big = (signs * (6e4 if dtype == torch.float16 else 1e30)).to(dtype)  # in float16 the norm overflows
    torch.testing.assert_close(polar_factor(big, method).double(), oracle(signs), rtol=0, atol=bound)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Where torch's batches of factorisations have gone wrong."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("method", [*DENSE, "newton-schulz"])
@pytest.mark.parametrize("shape", [(4, 6), (300, 320)], ids=str)
def test_inf_and_nan_stay_in_their_matrix(method: str, shape: tuple[int, int]) -> None:
    matrix = torch.from_numpy(np.random.default_rng(0).standard_normal(shape)).float()
    stack = torch.stack([matrix, matrix, matrix, torch.zeros(shape)])
    stack[0, 1, 2], stack[2, 0, 0] = torch.inf, torch.nan
    factor = polar_factor(stack, method)
    assert factor[0].isnan().all()
    assert factor[2].isnan().all()
    torch.testing.assert_close(factor[1], polar_factor(matrix, method), rtol=0, atol=1e-6)
    assert factor[3].eq(0).all()


@pytest.mark.parametrize("method", [*DENSE, "newton-schulz"])
def test_rank_deficient_matrices_keep_their_range(method: str) -> None:
    left, right = orthogonal(7, 3, 0), orthogonal(9, 3, 1)
    matrix = left @ torch.diag(torch.tensor([1.0, 0.6, 0.3], dtype=torch.float64)) @ right.T
    factor = polar_factor(matrix, method, steps=8)
    torch.testing.assert_close(factor @ right, left, rtol=0, atol=1e-7)
    assert torch.linalg.svdvals(factor).max() <= 1 + 1e-7
    exactly_singular = torch.tensor([[2.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(polar_factor(exactly_singular, method), exactly_singular / 2, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(300, 700), (700, 300), (600, 600), (2, 260, 300), (40, 90)], ids=str)
def test_lists_are_their_matrices(shape: tuple[int, ...]) -> None:
    generator = np.random.default_rng(0)
    some = [torch.from_numpy(generator.standard_normal(s)).float() for s in (shape, shape[::-1], (3, 5), shape)]
    together = polar_factors(some, PolarMethod())
    for factor, matrix in zip(together, some, strict=True):
        assert factor.is_contiguous()
        torch.testing.assert_close(factor, polar_factor(matrix), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("n", "k"), [(512, 100), (513, 700), (1201, 64)])
@pytest.mark.parametrize("beta", [0.0, 1.5])
def test_blocked_symmetric_product(n: int, k: int, beta: float) -> None:
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((n, k)))
    addend = x @ x.T
    alpha = 0.5 if beta else 1.0
    product = symmetric_product(x, x.T, addend, beta=beta, alpha=alpha)
    torch.testing.assert_close(product, (alpha + beta) * addend, rtol=1e-12, atol=1e-9)
    assert (product - product.T).abs().max() <= 1e-11 * k
    torch.testing.assert_close(symmetric_product(x, x.T), addend, rtol=1e-12, atol=1e-9)


def test_gradients_flow_through_the_blocked_form() -> None:
    matrix = torch.from_numpy(np.random.default_rng(0).standard_normal((520, 600))).requires_grad_()
    polar_factor(matrix, form="gram", steps=3)[0, 0].backward()
    assert matrix.grad is not None
    assert matrix.grad.isfinite().all()


def test_polar_express_has_the_published_digits() -> None:
    published = [
        (8.28721, -23.59589, 17.30039),
        (4.10706, -2.94785, 0.54484),
        (3.94869, -2.90890, 0.55182),
        (3.31842, -2.48849, 0.51005),
        (2.30065, -1.66890, 0.41881),
        (1.89130, -1.26800, 0.37681),
        (1.875, -1.25, 0.375),
    ]
    np.testing.assert_allclose(polar_express(1e-3, 7), published, rtol=0, atol=6e-6)


def test_margins_widen_the_interval_of_their_step() -> None:
    low, high = 0.01, 1.0
    margins = (1.0, 1.1, 1.4)
    for margin, (a, b, c) in zip(margins, polar_express(0.01, 3, cushion=0.0, margins=margins), strict=True):
        x = np.linspace(low / margin, high * margin, 200_001)
        value = a * x + b * x**3 + c * x**5
        low, high = float(value[0]), float(2 - value[0])
        assert value.min() >= low - 1e-7
        assert value.max() <= high + 1e-7
    assert polar_express(0.01, 3, margins=(1.0,)) == polar_express(0.01, 3)


@pytest.mark.parametrize("lower_bound", [1e-6, 1e-3, 0.02, 0.3, 0.9, 1 - 1e-7])
def test_polar_express_equioscillates(lower_bound: float) -> None:
    low, high = lower_bound, 1.0
    for a, b, c in polar_express(lower_bound, 8, cushion=0.0):
        x = np.linspace(low, high, 200_001)
        value = a * x + b * x**3 + c * x**5
        error = 1 - value[0]  # the largest, taken at the lower end, and as far above 1
        assert value.min() >= 1 - error - 1e-12
        assert value.max() == pytest.approx(1 + error, abs=1e-7)
        low, high = float(value[0]), float(2 - value[0])
    assert polar_express(lower_bound, 30)[-1] == pytest.approx((15 / 8, -10 / 8, 3 / 8), abs=1e-6)


def test_custom_triples_and_their_repetition() -> None:
    matrix = torch.from_numpy(np.random.default_rng(0).standard_normal((5, 9)))
    cubic = polar_factor(matrix, coefficients=[(1.5, -0.5, 0.0)], steps=40)  # Newton-Schulz as in the textbooks
    torch.testing.assert_close(cubic, oracle(matrix), rtol=0, atol=1e-13)
    for bad in [(), [(1, 2)], [(1, 2, "x")], 3, [1, 2, 3]]:
        with pytest.raises(ValueError, match="polar_coefficients must be"):
            polar_factor(matrix, coefficients=bad)  # pyright: ignore[reportArgumentType]


def test_form_and_restarts_follow_the_work_counts() -> None:
    full = [segments(t, torch.float32) for t in (1, 3, 4, 5, 6, 7, 8)]
    assert full == [[1], [3], [2, 2], [3, 2], [3, 3], [3, 2, 2], [3, 3, 2]]
    assert [segments(t, torch.bfloat16) for t in (1, 2, 5, 6)] == [[1], [2], [2, 2, 1], [2, 2, 2]]
    for dtype in (torch.float32, torch.bfloat16):
        assert cheaper_form(768, 768, 6, dtype) == "standard"
        assert cheaper_form(768, 3072, 6, dtype) == "gram"
        assert cheaper_form(64, 3072, 6, dtype) == "standard"
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((300, 900)))
    x /= x.norm()
    triples = polar_express(3e-3, 7)
    standard, gram = (newton_schulz(x, quintic_stages(triples, f, x.dtype)) for f in ("standard", "gram"))
    torch.testing.assert_close(standard, gram, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (2, 30, 40)], ids=str)
def test_the_sketch_finds_the_leading_directions(shape: tuple[int, ...]) -> None:
    rows, columns = shape[-2:]
    sigma = torch.cat([torch.linspace(1, 0.5, 6), torch.full((24,), 1e-3)]).double()
    left, right = orthogonal(rows, 30, 0), orthogonal(columns, 30, 1)
    matrix = (left @ torch.diag(sigma) @ right.T).expand(shape)
    factor, residual = polar_sketch(matrix, 6)
    torch.testing.assert_close(factor, (left[:, :6] @ right[:, :6].T).expand(shape), rtol=0, atol=1e-4)
    # 14 of 30 directions were searched: what remains is at most the 24 small ones and at least the last 16.
    assert residual.shape == shape[:-2]
    assert (residual <= math.sqrt(24) * 1e-3 / sigma.norm() * 1.01).all()
    assert (residual >= math.sqrt(16) * 1e-3 / sigma.norm() * 0.99).all()
    torch.testing.assert_close(polar_factor(matrix, "sketch", rank=6), factor, rtol=0, atol=1e-12)
    assert polar_sketch(torch.zeros(3, 4), 2).factor.eq(0).all()
    assert polar_sketch(torch.full((3, 4), torch.nan), 2).residual.isnan()


def test_bad_choices_say_what_would_do() -> None:
    with pytest.raises(ValueError, match=r"polar_dtype=torch\.bfloat16 is for polar_method='newton-schulz'"):
        PolarMethod("svd", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="polar_rank belongs to polar_method='sketch'; got 'sketch' with None"):
        PolarMethod("sketch")
    with pytest.raises(ValueError, match="polar_rank must be an integer >= 1; got 0"):
        PolarMethod("sketch", rank=0)
    with pytest.raises(ValueError, match="form must be one of auto, standard, gram"):
        PolarMethod(form="fast")
    for bad in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"lower_bound must be in \(0, 1\)"):
            polar_express(bad, 3)
    with pytest.raises(ValueError, match=r"cushion must be in \[0, 1\)"):
        polar_express(1e-3, 3, cushion=1.0)
    for margins in ((0.9,), (1.0, math.nan), (1.0,) * 4):
        with pytest.raises(ValueError, match="margins must be at most 3 numbers >= 1, one a step"):
            polar_express(1e-3, 3, margins=margins)


def test_the_optimizer_takes_schedules_triples_ranks_and_own_scales() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.zeros(6, 8)) for _ in range(3)]
    register_update_scale("third", lambda rows, columns: rows / columns / 3)
    try:
        groups = [
            {"params": weights[:1], "polar_steps": lambda step: 1 if step == 0 else 12, "update_scale": "third"},
            {"params": weights[1:2], "polar_coefficients": [[1.5, -0.5, 0]], "polar_steps": 60},
            {"params": weights[2:], "polar_method": "sketch", "polar_rank": 2},
        ]
        optimizer = MARS(groups, lr=1.0, mars_type="shampoo", gamma=0.0, clip_norm=None, betas=(0.0, 0.9))
        before, grads = weights, []
        for _ in range(2):
            before = [w.detach().clone() for w in weights]
            grads = [torch.randn(w.shape, generator=generator) for w in weights]
            for w, grad in zip(weights, grads, strict=True):
                w.grad = grad
            optimizer.step()
        steps = [b - w.detach() for b, w in zip(before, weights, strict=True)]
        torch.testing.assert_close(steps[0].double(), oracle(grads[0]) / 4, rtol=0, atol=1e-5)
        torch.testing.assert_close(steps[1].double(), oracle(grads[1]), rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.linalg.svdvals(steps[2])[:3], torch.tensor([1.0, 1, 0]), rtol=0, atol=1e-5)
        state = optimizer.state_dict()
        assert state["param_groups"][0]["polar_steps"] == {"schedule": "callable"}
        optimizer.load_state_dict(state)
        assert callable(optimizer.param_groups[0]["polar_steps"])
        with pytest.raises(ValueError, match="already registered"):
            register_update_scale("rms", lambda rows, columns: 1.0)
    finally:
        del UPDATE_SCALES["third"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_large_factors_compile_without_a_warning(dtype: torch.dtype) -> None:
    matrix = torch.from_numpy(np.random.default_rng(0).standard_normal((256, 300))).to(dtype)
    compiled = torch.compile(polar_factor, backend="eager", fullgraph=True)
    # Compiled, products are torch's and not the native kernel's: the same up to rounding.
    bound = 0.01 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(compiled(matrix), polar_factor(matrix), rtol=0, atol=bound)
