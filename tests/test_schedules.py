"""Schedules of gamma and of the learning rate, by their values at the corners."""

from __future__ import annotations

import pickle

import pytest
import torch

from mars_optim import MARS
from mars_optim.schedules import (
    Constant,
    Cosine,
    Linear,
    WarmupConstant,
    WarmupCosine,
    WarmupStableDecay,
    from_plain,
    to_plain,
)


def test_values_of_gamma() -> None:
    assert [Constant(0.5)(t) for t in (0, 7)] == [0.5, 0.5]
    assert [Linear(0.1, 0.0, 4)(t) for t in (0, 1, 4, 9)] == pytest.approx([0.1, 0.075, 0.0, 0.0])
    assert [Cosine(0.0, 1.0, 4)(t) for t in (0, 2, 4, 9)] == pytest.approx([0.0, 0.5, 1.0, 1.0])


def test_multipliers_of_the_learning_rate() -> None:
    assert [WarmupConstant(4)(t) for t in (0, 3, 50)] == pytest.approx([0.25, 1, 1])
    cosine = WarmupCosine(4, 24, final_ratio=0.1)
    assert [cosine(t) for t in (0, 3, 4, 14, 24)] == pytest.approx([0.25, 1, 1, 0.55, 0.1])
    wsd = WarmupStableDecay(4, 20, final_ratio=0.0, decay_fraction=0.2)
    assert [wsd(t) for t in (0, 4, 16, 18, 20)] == pytest.approx([0.25, 1, 1, 0.5, 0])


def test_they_drive_torch_schedulers_and_pickle() -> None:
    optimizer = MARS([torch.nn.Parameter(torch.ones(2, 2))], lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, WarmupCosine(2, 10))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-3)
    scheduler.load_state_dict(pickle.loads(pickle.dumps(scheduler.state_dict())))
    assert pickle.loads(pickle.dumps(WarmupCosine(2, 10))) == WarmupCosine(2, 10)


def test_plain_form_round_trips_and_a_callable_needs_its_like() -> None:
    for gamma in [0.3, Constant(0.1), Linear(0.0, 0.1, 5), Cosine(0.1, 0.0, 5)]:
        assert from_plain(to_plain(gamma), None) == gamma
    ramp = (0.1).__mul__
    assert from_plain(to_plain(ramp), ramp) is ramp
    with pytest.raises(ValueError, match="callable gamma"):
        from_plain(to_plain(ramp), 0.1)
