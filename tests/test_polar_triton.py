"""The Triton kernel for symmetric products: in Triton's interpreter without a GPU, compiled with one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from mars_optim.polar import polar_factor, use_triton

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

INTERPRETED = """
import torch
from mars_optim.polar.triton_symmetric import triangle_product

generator = torch.Generator().manual_seed(0)
for count, n, k, dtype, tolerance in [
    (None, 40, 24, torch.float32, 1e-5),  # several tiles, the last ones partly empty
    (3, 33, 50, torch.float32, 1e-5),
    (2, 16, 16, torch.float32, 1e-5),
]:
    shape = (n, k) if count is None else (count, n, k)
    x = torch.randn(shape, generator=generator).to(dtype)
    gram = triangle_product(x, x.mT, None, 1.0, 1.0, tile=16)
    torch.testing.assert_close(gram, x @ x.mT, rtol=tolerance, atol=tolerance * k)
    torch.testing.assert_close(gram, gram.mT, rtol=1e-6, atol=1e-5)
    square = triangle_product(gram, gram, gram, -2.5, 0.5, tile=16)
    torch.testing.assert_close(square, -2.5 * gram + 0.5 * gram @ gram, rtol=1e-4, atol=1e-3)
    tall = x.mT.contiguous().mT  # column-major
    torch.testing.assert_close(triangle_product(tall, tall.mT, None, 1.0, 1.0, tile=16), gram, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(triangle_product(gram, gram, gram, 0.0, 1.0, tile=16), gram @ gram, rtol=1e-4, atol=1e-3)
"""


@needs_triton
def test_kernel_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_without_triton_the_switch_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "mars_optim.polar.triton_symmetric", raising=False)
    with pytest.raises(ImportError, match="triton"):
        use_triton(True)
    use_triton(False)


@needs_triton
@needs_cuda
@pytest.mark.parametrize("shape", [(512, 512), (300, 1000), (1000, 300), (3, 257, 640)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernel_on_cuda(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    matrix = torch.randn(shape, device="cuda", dtype=dtype)
    exact = polar_factor(matrix.double(), "svd")
    use_triton(True)
    try:
        factor = polar_factor(matrix)
    finally:
        use_triton(False)
    sigma = torch.linalg.svdvals(factor.float())
    well = torch.linalg.svdvals(matrix.double())
    assert (sigma - 1)[well > 4e-3 * well.norm(dim=-1, keepdim=True)].abs().max() <= 0.03
    assert (factor.double() - exact).norm() <= 0.1 * exact.norm()
