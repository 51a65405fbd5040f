"""Runs PyTorch's own generic optimizer tests on MARS, from a PyTorch checkout of one's own.

    python tests/run_torch_test_optim.py PATH_TO_PYTORCH_CHECKOUT [pytest arguments]

MARS is put into `optim_db` of torch.testing._internal.common_optimizers in place of torch's optimizers, and then
TestOptimRenewed of the checkout's test/test_optim.py runs as it is. The checkout should be of the installed
torch's version. Nothing of it is copied.

Four classes stand for the choices that PyTorch's tests can't make by keyword, because they build optimizers with
`optim_cls(params)`: the elementwise types, the polar types, and both in exact mode.
"""

from __future__ import annotations

import os
import sys
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing._internal import common_optimizers
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
)
from torch.testing._internal.opinfo.core import DecorateInfo

from mars_optim import MARS


class MARSUniform(MARS):
    """optimize_1d=True, clip off: every tensor, whatever its shape, is treated alike, entry by entry."""

    def __init__(self, params: Any, *args: Any, **kwargs: Any):
        super().__init__(params, *args, **{"optimize_1d": True, "clip_norm": None, **kwargs})


class MARSPolar(MARS):
    def __init__(self, params: Any, *args: Any, **kwargs: Any):
        super().__init__(params, *args, **{"mars_type": "m", **kwargs})


class MARSExact(MARS):
    def __init__(self, params: Any, *args: Any, **kwargs: Any):
        super().__init__(params, *args, **{"is_approx": False, **kwargs})


class MARSExactPolar(MARSExact):
    def __init__(self, params: Any, *args: Any, **kwargs: Any):
        super().__init__(params, *args, **{"mars_type": "m", **kwargs})


# test_load_state_dict_post_hook knows its hook by lr == 0.003, which is MARS's default: each input gives another.
SETTINGS: list[dict[str, Any]] = [
    {},
    {"lr": 0.01},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "maximize": True},
    {"weight_decay": 0.1, "amsgrad": True},
    {"optimize_1d": True, "gamma": 0.1},
    {"first_step": "zero", "clip_norm": None, "max_grad_norm": 1.0},
    {"lr_1d": 1e-3, "betas_1d": (0.8, 0.9), "weight_decay_1d": 0.01},
]
UNIFORM_SETTINGS: list[dict[str, Any]] = [
    {},
    {"lr": 0.01},
    {"weight_decay": 0.1, "maximize": True},
    {"weight_decay": 0.1, "amsgrad": True, "gamma": 0.1},
]


def inputs(mars_types: tuple[str, ...], settings: list[dict[str, Any]]) -> Callable[..., list[OptimizerInput]]:
    def optim_inputs(device: Any, dtype: Any = None) -> list[OptimizerInput]:
        return [
            OptimizerInput(params=None, kwargs={"mars_type": t, "lr": 2e-3, **s}, desc=f"{t} {s}")  # type: ignore[arg-type]
            for t in mars_types
            for s in settings
        ]

    return optim_inputs


def error_inputs(device: Any, dtype: Any) -> list[ErrorOptimizerInput]:
    if torch.device(device).type != "cpu":
        return []
    bad: list[dict[str, Any]] = [
        {"lr": -1.0},
        {"betas": (1.0, 0.9)},
        {"betas_1d": (0.9, 1.5)},
        {"eps": -1.0},
        {"weight_decay": -0.5},
        {"mars_type": "sgd"},
        {"first_step": "sometimes"},
        {"clip_norm": -1.0},
        {"fused": "x"},
    ]
    errors = [
        ErrorOptimizerInput(
            OptimizerInput(params=None, kwargs=kwargs, desc=f"bad {name}"),  # type: ignore[arg-type]
            error_type=ValueError,  # type: ignore[arg-type]
            error_regex=name,
        )
        for kwargs in bad
        for name in kwargs
    ]
    for error in errors:
        error.optimizer_error_input.params = [torch.nn.Parameter(torch.randn(1, 1, device=device, dtype=dtype))]
    sparse = torch.nn.Parameter(torch.randn(3, 2, device=device, dtype=dtype))
    sparse.grad = torch.eye(3, 2).to_sparse()
    errors.append(
        ErrorOptimizerInput(
            OptimizerInput(params=[sparse], kwargs={}, desc="sparse gradient"),
            error_on=OptimizerErrorEnum.STEP_ERROR,
            error_type=RuntimeError,
            error_regex="sparse",
        )
    )
    return [*common_optimizers.get_error_inputs_for_all_optims(device, dtype), *errors]


def skip(reason: str, *names: str) -> list[Any]:
    return [DecorateInfo(unittest.skip(reason), "TestOptimRenewed", name) for name in names]


NOT_FOR_MARS = skip(
    "patches torch.optim's private _multi_tensor_* functions, which MARS doesn't have",
    "test_defaults_changed_to_foreach",
)
NOT_FOR_EXACT = [
    *NOT_FOR_MARS,
    *skip(
        "calls step() without the closure that exact mode needs",
        *("test_param_groups_weight_decay", "test_param_groups_lr"),
    ),
    *skip("sets tolerance_grad, an argument of LBFGS", "test_second_order_optims_return_consistent_types"),
]
ELEMENTWISE, POLAR = ("adamw", "lion"), ("shampoo", "m")


def mars_optimizer_infos() -> list[OptimizerInfo]:
    """The 1-D rule and the per-tensor clip look at a tensor's shape.

    So a complex tensor and its real pairs (one dimension more), or its two parts, are different tensors to them;
    PyTorch's complex tests run on MARSUniform, where neither looks. Exact mode's complex support is held by
    test_trajectories: PyTorch's closures there count their calls.
    """
    approx: dict[str, Any] = {
        "supported_impls": ("foreach", "fused", "differentiable"),
        "optim_error_inputs_func": error_inputs,
        "skips": NOT_FOR_MARS,
    }
    exact: dict[str, Any] = {
        "supported_impls": (),
        "step_requires_closure": True,
        "supports_complex": False,
        "skips": NOT_FOR_EXACT,
    }
    return [
        OptimizerInfo(MARS, optim_inputs_func=inputs(ELEMENTWISE, SETTINGS), supports_complex=False, **approx),  # type: ignore[arg-type]
        OptimizerInfo(MARSUniform, optim_inputs_func=inputs(ELEMENTWISE, UNIFORM_SETTINGS), **approx),  # type: ignore[arg-type]
        OptimizerInfo(MARSPolar, optim_inputs_func=inputs(POLAR, SETTINGS), supports_complex=False, **approx),  # type: ignore[arg-type]
        OptimizerInfo(MARSExact, optim_inputs_func=inputs(ELEMENTWISE, SETTINGS), **exact),  # type: ignore[arg-type]
        OptimizerInfo(MARSExactPolar, optim_inputs_func=inputs(POLAR, SETTINGS), **exact),  # type: ignore[arg-type]
    ]


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    checkout, *pytest_arguments = arguments
    test_file = Path(checkout).resolve() / "test" / "test_optim.py"
    if not test_file.is_file():
        print(f"{test_file} doesn't exist; the first argument is a PyTorch checkout", file=sys.stderr)
        return 2
    common_optimizers.optim_db[:] = mars_optimizer_infos()
    # Its siblings are imported as optim.*; its conftest and configuration belong to PyTorch's CI.
    sys.path.insert(0, str(test_file.parent))
    selection = [] if "-k" in pytest_arguments else ["-k", "TestOptimRenewed"]
    isolation = ["-c", os.devnull, "--rootdir", str(test_file.parent), "--noconftest", "-p", "no:cacheprovider"]
    return int(pytest.main([*isolation, str(test_file), *selection, *pytest_arguments]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
