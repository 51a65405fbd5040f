"""The oracle itself, where a closed form or torch.optim says what it must give."""

from __future__ import annotations

import math

import pytest
import torch

from oracle import Oracle, polar
from problems import MinibatchQuadratic, assert_close, make_parameters

NAMES = ("wide", "tall", "conv")


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_without_correction_and_clip_it_is_adamw(amsgrad: bool, maximize: bool) -> None:
    parameters = make_parameters(NAMES)
    adamw = torch.optim.AdamW(
        parameters, lr=0.02, betas=(0.8, 0.9), weight_decay=0.1, amsgrad=amsgrad, maximize=maximize
    )
    oracle = Oracle(
        parameters,
        lr=0.02,
        betas=(0.8, 0.9),
        weight_decay=0.1,
        amsgrad=amsgrad,
        maximize=maximize,
        gamma=0.0,
        clip_norm=None,
    )
    problem = MinibatchQuadratic(parameters)
    for t in range(20):
        oracle.step(problem.gradients(oracle.x, t))
        problem.assign(parameters, t)
        adamw.step()
        for p, x in zip(parameters, oracle.x, strict=True):
            assert_close(p, x, atol=1e-13)


def test_below_two_dimensions_it_is_adamw_with_its_own_hyperparameters() -> None:
    parameters = make_parameters(("scalar", "vector"))
    adamw = torch.optim.AdamW(parameters, lr=5e-3, betas=(0.7, 0.8), weight_decay=0.3)
    oracle = Oracle(
        parameters, mars_type="m", lr=0.02, lr_1d=5e-3, betas_1d=(0.7, 0.8), weight_decay_1d=0.3, weight_decay=0.1
    )
    problem = MinibatchQuadratic(parameters)
    for t in range(20):
        oracle.step(problem.gradients(oracle.x, t))
        problem.assign(parameters, t)
        adamw.step()
        for p, x in zip(parameters, oracle.x, strict=True):
            assert_close(p, x, atol=1e-13)


def test_global_clip_is_clip_grad_norm() -> None:
    parameters = make_parameters(("vector", "wide"))
    oracle = Oracle(parameters, lr=0.02, max_grad_norm=0.5, gamma=0.0, clip_norm=None, betas_1d=(0.95, 0.99))
    adamw = torch.optim.AdamW(parameters, lr=0.02, betas=(0.95, 0.99), weight_decay=0.0)
    problem = MinibatchQuadratic(parameters)
    for t in range(10):
        oracle.step(problem.gradients(oracle.x, t))
        problem.assign(parameters, t)
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        adamw.step()
        for p, x in zip(parameters, oracle.x, strict=True):
            assert_close(p, x, atol=1e-13)


def test_polar() -> None:
    angle = 0.3
    rotation = torch.tensor(
        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64
    )
    assert_close(polar(rotation @ torch.diag(torch.tensor([3.0, 0.2], dtype=torch.float64))), rotation, atol=1e-14)
    column = torch.tensor([[3.0], [4.0]], dtype=torch.float64)
    assert_close(polar(column @ column.T), column @ column.T / 25, atol=1e-14)
    assert torch.count_nonzero(polar(torch.zeros(3, 2, dtype=torch.float64))) == 0
