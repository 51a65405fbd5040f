"""The polar factor against the SVD of another library, its bands, its invariances and its bad input."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from mars_optim import polar_factor
from mars_optim.polar import PolarMethod, check_view, matrices, polar_factors, update_scale
from mars_optim.polar.coefficients import COEFFICIENTS

SHAPES = [(5, 5), (3, 8), (8, 3), (1, 6), (6, 1), (1, 1), (4, 3, 7), (2, 3, 5, 4)]

# Newton-Schulz output for singular values in [3e-3, 1] of the Frobenius norm. The polynomials alone give the published
# bands (rounded outwards in the third digit); safety moves five Polar Express steps, [0.994, 1.006], a little.
BANDS = {
    ("jordan", 5): (0.681, 1.203),
    ("you", 5): (0.977, 1.146),
    ("polar-express", 5): (0.988, 1.006),
    ("polar-express", 6): (0.9999, 1.0001),
    ("polar-express", 8): (1 - 1e-9, 1 + 1e-9),
}


def numpy_polar(matrix: Tensor) -> Tensor:
    u, _, vh = np.linalg.svd(matrix.numpy(), full_matrices=False)
    return torch.from_numpy(u @ vh)


def with_singular_values(values: Tensor, rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(rows, len(values), generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(columns, len(values), generator=generator, dtype=torch.float64))
    return u @ torch.diag(values) @ v.T


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", ["svd", "newton-schulz"])
def test_equals_numpys_svd(shape: tuple[int, ...], method: str) -> None:
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    # 14 steps of a polynomial with p(1) = 1, p'(1) = p''(1) = 0 converge for any condition number met here.
    factor = polar_factor(matrix, method, steps=14)
    torch.testing.assert_close(factor, numpy_polar(matrix), rtol=0, atol=1e-11)


@pytest.mark.parametrize(("coefficients", "steps"), BANDS, ids=str)
def test_singular_values_end_in_the_band(coefficients: str, steps: int) -> None:
    # Frobenius norm 1 with one large value, so that the small ones reach 3e-3 of it.
    values = torch.logspace(np.log10(3e-3), -1, 40, dtype=torch.float64)
    values = torch.cat([values, (1 - values.square().sum()).sqrt()[None]])
    factor = polar_factor(with_singular_values(values, 41, 60), coefficients=coefficients, steps=steps)
    sigma = torch.linalg.svdvals(factor)
    low, high = BANDS[coefficients, steps]
    assert low <= sigma.min().item() <= sigma.max().item() <= high


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-3), (torch.bfloat16, 3e-2), (torch.float16, 5e-3)])
def test_six_polar_express_steps_in_low_precision(dtype: torch.dtype, tolerance: float) -> None:
    matrix = torch.randn(48, 96, generator=torch.Generator().manual_seed(0))
    sigma = torch.linalg.svdvals(polar_factor(matrix, dtype=dtype))
    assert (sigma - 1).abs().max().item() <= tolerance


@pytest.mark.parametrize("method", ["svd", "newton-schulz"])
def test_rank_deficient_and_zero(method: str) -> None:
    values = torch.tensor([1.0, 0.5], dtype=torch.float64)
    matrix = with_singular_values(values, 6, 9)
    expected = with_singular_values(torch.ones(2, dtype=torch.float64), 6, 9)
    torch.testing.assert_close(polar_factor(matrix, method, steps=12), expected, rtol=0, atol=1e-10)
    assert polar_factor(torch.zeros(3, 4), method).eq(0).all()
    assert polar_factor(torch.zeros(0, 4), method).shape == (0, 4)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_scale_does_not_matter(scale: float) -> None:
    matrix = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(polar_factor(matrix * scale), polar_factor(matrix), rtol=0, atol=1e-5)


def test_orthogonal_invariance_transposition_and_fixed_point() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(5, 9, dtype=torch.float64, generator=generator)
    q, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=generator))
    factor = polar_factor(matrix)
    torch.testing.assert_close(polar_factor(q @ matrix), q @ factor, rtol=0, atol=1e-12)
    torch.testing.assert_close(polar_factor(matrix.T), factor.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(polar_factor(q, steps=10), q, rtol=0, atol=1e-12)


def test_a_batch_is_its_matrices_and_nan_stays_in_its_own() -> None:
    generator = torch.Generator().manual_seed(0)
    some = [torch.randn(s, generator=generator) for s in [(3, 6), (6, 3), (2, 3, 6), (4, 4)]]
    how = PolarMethod()
    for together, matrix in zip(polar_factors(some, how), some, strict=True):
        torch.testing.assert_close(together, polar_factor(matrix), rtol=0, atol=2e-6)
    spoilt = torch.stack([some[0], some[0] * float("inf"), some[0]])
    factors = polar_factor(spoilt)
    assert factors[1].isnan().any()
    torch.testing.assert_close(factors[::2], polar_factor(spoilt[::2]), rtol=0, atol=2e-6)


def test_bad_input_says_what_would_do() -> None:
    with pytest.raises(ValueError, match=r"needs a matrix .* got shape \(3,\)"):
        polar_factor(torch.ones(3))
    with pytest.raises(TypeError, match="complex64"):
        polar_factor(torch.ones(3, 3, dtype=torch.complex64))
    with pytest.raises(
        ValueError, match="polar_method must be one of newton-schulz, svd, newton, qdwh, sketch; got 'qr'"
    ):
        polar_factor(torch.ones(3, 3), "qr")
    with pytest.raises(
        ValueError, match="polar_coefficients must be None, one of jordan, you, polar-express, degree-17, or"
    ):
        polar_factor(torch.ones(3, 3), coefficients="jordn")
    with pytest.raises(ValueError, match="polar_steps must be an integer >= 1; got 0"):
        polar_factor(torch.ones(3, 3), steps=0)


def test_published_coefficients_start_steep_and_flatten() -> None:
    for _, table in COEFFICIENTS.items():
        assert all(a >= b - 1e-6 for (a, _, _), (b, _, _) in pairwise(table))


def test_views_share_memory_and_check_sizes() -> None:
    kernel = torch.zeros(4, 3, 2, 2)
    matrices(kernel, "flatten")[0].fill_(1)
    assert kernel.eq(1).all()
    first, second = matrices(kernel, ("split", 0, (1, 3)))
    first.fill_(2)
    assert kernel[0].eq(2).all()
    assert second.shape == (3, 12)
    with pytest.raises(ValueError, match="add up to 5"):
        matrices(kernel, ("split", 0, (2, 3)))
    for bad in ["flat", ("split", 2, (1, 1)), ("split", 0, ()), ("split", 0, (0, 4)), 3]:
        with pytest.raises(ValueError, match="matrix_view must be"):
            check_view(bad)


def test_update_scales() -> None:
    assert update_scale("none", 8, 2) == 1
    assert update_scale("spectral", 8, 2) == 2
    assert update_scale("spectral", 2, 8) == 1
    assert update_scale("spectral", 2, 8, transposed=True) == 2
    assert update_scale("rms", 25, 4) == pytest.approx(1.0)
