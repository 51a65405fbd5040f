"""Modes, gamma and values that change in mid-training; state that must not be used once it is out of date."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mars_optim import MARS


def exact_step(optimizer: MARS, p: nn.Parameter) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    optimizer.step(closure)


def test_a_mode_that_comes_back_starts_anew() -> None:
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = MARS([p], is_approx=False)
    (group,) = optimizer.param_groups
    for is_approx in (False, True, False, True):
        group["is_approx"] = is_approx
        seen: list[Tensor] = []
        for _ in range(2):
            if not is_approx:
                with optimizer.previous_params():
                    seen.append(p.detach().clone())
                    (p * p).sum().backward()
            (p * p).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        if not is_approx:
            # Both start from the weights of this phase's first step: the first has no other, the second goes back.
            assert torch.equal(seen[0], seen[1])
            assert not torch.equal(p, seen[1])
        state = optimizer.state[p]
        assert ("prev_param" in state, "prev_grad" in state) == (not is_approx, is_approx)


def test_returning_to_exact_evaluates_the_present_weights_first() -> None:
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = MARS([p], is_approx=False)
    exact_step(optimizer, p)
    optimizer.param_groups[0]["is_approx"] = True
    for _ in range(5):
        p.grad = torch.ones_like(p)
        optimizer.step()
    optimizer.param_groups[0]["is_approx"] = False
    now = p.detach().clone()
    with optimizer.previous_params():
        assert torch.equal(p, now)


def test_gamma_zero_forgets_the_previous_gradient() -> None:
    p, q = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    switched, plain = (MARS([x], gamma=0.3, clip_norm=None) for x in (p, q))
    for gamma in (0.3, 0.0, 0.0, 0.3):
        switched.param_groups[0]["gamma"] = gamma
        plain.param_groups[0]["gamma"] = 0.0 if gamma == 0.3 and "prev_grad" not in switched.state[p] else gamma
        for x, optimizer in ((p, switched), (q, plain)):
            x.grad = torch.full_like(x, 1.0 + gamma)
            optimizer.step()
    assert torch.equal(p, q)


def test_an_aborted_second_evaluation_leaves_no_gradient_behind() -> None:
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = MARS([p], is_approx=False)
    calls: list[int] = []

    def closure() -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("second")
        loss = (p * p).sum()
        loss.backward()
        return loss

    with pytest.raises(KeyError):
        optimizer.step(closure)
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="needs the gradient at the previous weights"):
        optimizer.step()


def test_overflow_at_the_previous_weights_is_counted_though_the_scaler_skips() -> None:
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = MARS([p], is_approx=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with optimizer.previous_params(grad_scaler=scaler):
        (scaler.scale((p * torch.inf).sum())).backward()
    assert optimizer.num_skipped_steps == 1
    assert scaler.get_scale() == 2.0**9
    before = p.detach().clone()
    scaler.scale((p * p).sum()).backward()
    scaler.step(optimizer)
    assert torch.equal(p, before)
    assert optimizer.num_skipped_steps == 1


def test_a_nan_before_the_first_step_does_not_count_under_capturable() -> None:
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = MARS([p], is_approx=False, capturable=True)
    with optimizer.previous_params():
        (p * torch.nan).sum().backward()
    (p * p).sum().backward()
    optimizer.step()
    assert p.isfinite().all()


def test_loading_another_models_state_names_the_parameter_and_changes_nothing() -> None:
    small, large = (nn.Parameter(torch.ones(n, 2)) for n in (2, 3))
    optimizers = [MARS([("layer.weight", x)]) for x in (small, large)]
    for x, optimizer in zip((small, large), optimizers, strict=True):
        x.grad = torch.ones_like(x)
        optimizer.step()
    with pytest.raises(ValueError, match=r"parameter layer.weight has shape \(3, 2\), but its exp_avg .* \(2, 2\)"):
        optimizers[1].load_state_dict(optimizers[0].state_dict())
    assert optimizers[1].state[large]["exp_avg"].shape == (3, 2)


def test_state_dict_inside_previous_params_is_refused() -> None:
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = MARS([p], is_approx=False)
    with optimizer.previous_params(), pytest.raises(RuntimeError, match="weights are x_"):
        optimizer.state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"is_approx": "false"}, "is_approx must be of type bool; got 'false'"),
        ({"maximize": 1.0}, "maximize must be of type bool"),
        ({"fused": "x"}, "fused must be of type bool or NoneType; got 'x'"),
        ({"preconditioner": ["adamw"]}, "preconditioner must be of type str or NoneType"),
        ({"lr": True}, "lr must be a finite number >= 0; got True"),
    ],
)
def test_switches_and_names_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MARS([nn.Parameter(torch.ones(2))], **options)


def test_lr_1d_survives_a_state_dict_that_does_not_know_it() -> None:
    p = nn.Parameter(torch.ones(2))
    state_dict = MARS([p], lr=1e-2, lr_1d=1e-3).state_dict()
    del state_dict["param_groups"][0]["lr_1d_ratio"]
    optimizer = MARS([p], lr=1e-2, lr_1d=1e-3)
    optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["lr_1d_ratio"] == pytest.approx(0.1)


@pytest.mark.parametrize(("mars_type", "expected"), [("adamw", 12), ("lion", 8), ("shampoo", 8), ("m", 8)])
@pytest.mark.parametrize("is_approx", [True, False])
def test_bytes_of_state_per_parameter(mars_type: str, expected: int, is_approx: bool) -> None:
    """The README's figures, for fp32 matrices; two scalars a tensor aside."""
    p = nn.Parameter(torch.ones(64, 64))
    optimizer = MARS([p], mars_type=mars_type, is_approx=is_approx)
    exact_step(optimizer, p)
    assert sum(t.nbytes for t in optimizer.state[p].values() if t.ndim) == expected * p.numel()


@pytest.mark.parametrize("mars_type", ["adamw", "lion", "m"])
def test_whatever_is_replaced_between_steps_is_seen_by_the_next(mars_type: str) -> None:
    """Native kernels are given addresses; none of them may be that of something the user has replaced."""

    def replace(t: int, params: list[nn.Parameter], optimizer: MARS) -> None:
        first, second, third = params[:3]
        state: dict[str, Any] = optimizer.state[first]
        if t == 1:
            first.grad = None
        elif t == 2:
            assert second.grad is not None
            second.grad = second.grad.t().contiguous().t()
        elif t == 3:
            state["exp_avg"] = state["exp_avg"].t().contiguous().t() * 2
        elif t == 4:
            second.data = second.data.clone() + 1
        elif t == 5:
            optimizer.state[second] = {name: value * 1.5 for name, value in optimizer.state[second].items()}
            optimizer.state[second]["step"].fill_(3)
        elif t == 6:
            assert third.grad is not None
            larger = torch.zeros(9)
            larger[2:7] = third.grad
            third.grad = larger[2:7]
        elif t == 7:
            optimizer.load_state_dict(deepcopy(optimizer.state_dict()))
        elif t == 8:
            state["prev_grad"] = state["prev_grad"].double().float() + 0.1
        elif t == 9:
            added = nn.Parameter(torch.ones(4, 4))
            added.grad = torch.full((4, 4), 0.1)
            optimizer.add_param_group({"params": [added]})
            params.append(added)
        elif t == 10:
            state["step"] = state["step"].double()
        elif t == 11:
            del optimizer.state[third]

    results: list[list[nn.Parameter]] = []
    for native in (True, False):
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 4), (4, 4), (5,))]
        switches: dict[str, Any] = {"fused": True} if native else {"foreach": False}
        optimizer = MARS(params, lr=0.01, mars_type=mars_type, polar_method="svd", **switches)
        every = list(params)
        for t in range(14):
            for p in every:
                p.grad = torch.randn(p.shape, generator=generator)
            replace(t, every, optimizer)
            optimizer.step()
        results.append(every)
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-5)
