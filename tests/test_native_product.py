"""Products of matrices by the native kernel against float64."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from mars_optim.polar import polar_factor, symmetric
from mars_optim.polar.native_product import is_available, native_product, scaled_transpose, takes
from mars_optim.polar.symmetric import product, symmetric_product, transposed_product

# Distance from the exact product, as a part of |beta| ||addend|| + |alpha| ||left|| ||right||: rounding of the result,
# and of sums in fp32.
BOUND = {torch.bfloat16: 2**-8, torch.float32: 2e-6}
DTYPES = [
    pytest.param(d, marks=pytest.mark.skipif(not is_available(d), reason="this CPU leaves it to torch")) for d in BOUND
]
SHAPES = [(256, 256, 256), (257, 300, 258), (301, 1029, 2000), (768, 270, 262), (258, 6000, 256)]


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def within(matrix: Tensor) -> Tensor:
    """The same values as rows of a wider matrix whose other values are nan."""
    wide = matrix.new_full((matrix.shape[0], matrix.shape[1] + 7), torch.nan)
    wide[:, : matrix.shape[1]] = matrix
    return wide[:, : matrix.shape[1]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("columns_first", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_is_right_for_every_layout(
    shape: tuple[int, int, int], columns_first: bool, transposed: bool, dtype: torch.dtype
) -> None:
    n, m, k = shape
    left = within(random(n, k, dtype=dtype))
    right = within(random(m, k, dtype=dtype, seed=1)).mT if columns_first else within(random(k, m, dtype=dtype, seed=1))
    addend = within(random(n, m, dtype=dtype, seed=2))
    for extra, beta, alpha in ((None, 1.0, 1.0), (addend, -20.0, 0.5)):
        assert takes(left, right, extra)
        got = native_product(left, right, extra, beta=beta, alpha=alpha, transposed=transposed)
        want = alpha * left.double() @ right.double()
        scale = alpha * left.double().norm() * right.double().norm() / k**0.5
        if extra is not None:
            want += beta * extra.double()
            scale += abs(beta) * extra.double().norm()
        assert got.is_contiguous()
        error = (got.mT if transposed else got).double() - want
        assert error.norm() <= BOUND[dtype] * scale
        assert error.abs().max() <= 20 * BOUND[dtype] * scale / (n * m) ** 0.5, "no single entry is wrong"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(256, 256), (259, 400), (768, 770), (1000, 300)])
def test_symmetric_products_are_symmetric_to_the_bit_and_like_plain_ones(
    rows: int, columns: int, dtype: torch.dtype
) -> None:
    x = random(rows, columns, dtype=dtype)
    whole = native_product(x, x.mT)
    got = native_product(x, x.mT, is_symmetric=True)
    assert torch.equal(got, got.mT)
    assert torch.equal(got.tril(), whole.tril())
    even = whole[: rows // 2 * 2, : rows // 2 * 2] / rows
    square = native_product(even, even, even, beta=-3.0, alpha=0.5, is_symmetric=True)
    assert torch.equal(square.tril(), native_product(even, even, even, beta=-3.0, alpha=0.5).tril())
    assert torch.equal(square, square.mT)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    x = random(400, 900, dtype=dtype)
    before = torch.get_num_threads()
    try:
        results: list[list[Tensor]] = []
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            r = native_product(x, x.mT, is_symmetric=True)
            results.append([r, native_product(r, x, x), native_product(r, x, x, transposed=True)])
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(map(torch.equal, others, results[0]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_in_its_row_and_column(dtype: torch.dtype) -> None:
    left, right = random(260, 256, dtype=dtype), random(256, 300, dtype=dtype, seed=1)
    left[259, 255], right[0, 299] = torch.nan, torch.inf
    bad = ~native_product(left, right).isfinite()
    assert bad[259].all()
    assert bad[:, 299].all()
    assert int(bad.sum()) == 260 + 300 - 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(256, 256), (3, 1000), (1000, 3), (517, 131), (0, 5)])
def test_a_scaled_transpose(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = within(random(*shape, dtype=dtype))
    got = scaled_transpose(x, 0.3)
    assert got.is_contiguous()
    torch.testing.assert_close(got, (0.3 * x).mT)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_kernel_does_not_take_is_multiplied_all_the_same(dtype: torch.dtype) -> None:
    x = random(300, 300, dtype=dtype)
    odd, narrow, batch = x[:, :299], x[:, :255], torch.stack([x, x])
    every_other = random(300, 600, dtype=dtype)[:, ::2]
    assert takes(x, x.mT, x)
    assert not takes(every_other, x, None)
    for left in (odd, narrow, batch, every_other):
        assert not takes(left, left.mT, None)
        want = left.double() @ left.mT.double()
        bound = BOUND[dtype] * left.double().norm() ** 2
        assert (product(left, left.mT).double() - want).norm() <= bound
        assert (symmetric_product(left, left.mT).double() - want).norm() <= bound
    assert not takes(x, x.double(), None)
    assert not takes(x.clone().requires_grad_(), x, None)
    assert not takes(x.to("meta"), x.to("meta"), None)
    symmetric_left, right = (x + x.mT)[:299, :299], x[:299]
    want = (2 * right.double() + symmetric_left.double() @ right.double()).mT
    bound = BOUND[dtype] * (2 * right.double().norm() + symmetric_left.double().norm() * right.double().norm())
    assert (transposed_product(symmetric_left, right, right, beta=2.0).double() - want).norm() <= bound


@pytest.mark.parametrize("dtype", DTYPES)
def test_polar_factors_are_made_of_such_products(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = [random(300, 800, dtype=dtype), random(800, 300, dtype=dtype), random(300, 300, dtype=dtype)]
    factors = [polar_factor(m) for m in matrices]
    asked: list[bool] = []
    monkeypatch.setattr(symmetric, "takes", lambda *_: asked.append(True))
    for m, factor in zip(matrices, factors, strict=True):
        asked.clear()
        plain = polar_factor(m)
        assert len(asked) > 6
        assert (factor - plain).norm() <= (0.02 if dtype == torch.bfloat16 else 2e-5) * plain.norm()


@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_a_lower_level_of_the_instruction_set_leaves_products_to_torch(level: str) -> None:
    code = "import torch; from mars_optim.polar.native_product import is_available; print(is_available(torch.float32))"
    environment = {**os.environ, "MARS_NATIVE_ISA": level}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "False\n"
