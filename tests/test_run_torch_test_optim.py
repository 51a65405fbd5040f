"""The registration that run_torch_test_optim.py makes, and the runner on a checkout of one small test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import Parameter
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    _get_optim_inputs_including_global_cliquey_kwargs,
)

from run_torch_test_optim import mars_optimizer_infos

infos = pytest.mark.parametrize("info", mars_optimizer_infos(), ids=lambda info: info.name)


@infos
def test_every_input_constructs_and_steps(info: OptimizerInfo) -> None:
    """For every type, in both modes, and with foreach and differentiable as PyTorch adds them."""
    every = _get_optim_inputs_including_global_cliquey_kwargs("cpu", torch.float32, info)
    assert len(every) >= 8
    for optim_input in every:
        leaves = [Parameter(torch.ones(2, 3)), Parameter(torch.ones(3))]
        differentiable = optim_input.kwargs.get("differentiable", False)
        parameters: list[torch.Tensor] = [p.clone() if differentiable else p for p in leaves]
        optimizer = info.optim_cls(parameters, **optim_input.kwargs)  # type: ignore[operator]

        def closure(parameters: list[torch.Tensor] = parameters) -> float:
            for p in parameters:
                p.grad = torch.ones_like(p)
            return 0.0

        for _ in range(2):
            optimizer.step(closure)
        assert all(not torch.equal(p, torch.ones_like(p)) for p in parameters)


@infos
def test_every_error_input_raises(info: OptimizerInfo) -> None:
    if info.optim_error_inputs_func is None:
        pytest.skip("errors are registered once, with the approx classes")
    for error in info.optim_error_inputs_func("cpu", torch.float32):

        def fail(info: OptimizerInfo = info, error: ErrorOptimizerInput = error) -> None:
            given = error.optimizer_error_input
            optimizer = info.optim_cls(given.params, **given.kwargs)  # type: ignore[operator]
            if error.error_on == OptimizerErrorEnum.STEP_ERROR:
                optimizer.step()

        expectation = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
        with expectation(error.error_type, match=error.error_regex):
            fail()


CHECKOUT = """
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import optim_db, optims
from torch.testing._internal.common_utils import TestCase


class TestOptimRenewed(TestCase):
    @optims(optim_db)
    def test_name(self, device, dtype, optim_info):
        self.assertTrue(optim_info.name.startswith("MARS"))


instantiate_device_type_tests(TestOptimRenewed, globals(), only_for="cpu")
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    runner = Path(__file__).with_name("run_torch_test_optim.py")
    return subprocess.run(
        [sys.executable, str(runner), *arguments], capture_output=True, text=True, check=False, timeout=120
    )


def test_the_runner_runs_the_checkouts_tests_on_mars_alone(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_optim.py").write_text(CHECKOUT)
    result = run(str(tmp_path), "-q")
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{len(mars_optimizer_infos())} passed" in result.stdout


def test_the_runner_says_what_it_misses(tmp_path: Path) -> None:
    result = run(str(tmp_path))
    assert result.returncode == 2
    assert "test_optim.py doesn't exist" in result.stderr
