"""Small deterministic problems that the oracle and the library are both driven through."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from oracle import Oracle, real

TYPES = ("adamw", "lion", "shampoo", "m")
ELEMENTWISE = ("adamw", "lion")
POLAR = ("shampoo", "m")
BACKENDS: dict[str, dict[str, Any]] = {
    "reference": {"foreach": False},
    "foreach": {"foreach": True},
    "native": {"fused": True},
}
MODES = {"approx": True, "exact": False}

# name -> (shape, non-contiguous?)
SHAPES: dict[str, tuple[tuple[int, ...], bool]] = {
    "scalar": ((), False),
    "vector": ((5,), False),
    "one": ((1, 1), False),
    "wide": ((3, 7), False),
    "tall": ((7, 3), False),
    "square": ((4, 4), False),
    "conv": ((4, 3, 2, 2), False),
    "stacked": ((2, 4, 3), False),
    "empty_vector": ((0,), False),
    "empty_matrix": ((0, 3), False),
    "strided_vector": ((5,), True),
    "strided_matrix": ((5, 4), True),
    "strided_conv": ((3, 2, 2, 2), True),
}

Gradients = list[Tensor | None]


def make_parameter(shape: tuple[int, ...], dtype: torch.dtype, strided: bool, generator: torch.Generator) -> Parameter:
    value = torch.randn(shape, dtype=torch.float64, generator=generator) / 2
    if dtype.is_complex:
        value = torch.complex(value, torch.randn(shape, dtype=torch.float64, generator=generator) / 2)
    value = value.to(dtype)
    if strided:
        value = torch.stack([value, torch.zeros_like(value)], dim=-1)[..., 0]
    return Parameter(value)


def make_parameters(
    names: Sequence[str] = tuple(SHAPES), dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [make_parameter(SHAPES[n][0], dtype, SHAPES[n][1], generator) for n in names]


class MinibatchQuadratic:
    """f_t(x) = a_t/2 sum h_t (x - z_t)^2, with a_t spread so that the clip is at times on, at times off.

    Gradients are rounded to the parameter's own number format, so that the oracle can be handed exactly what
    the library was.
    """

    def __init__(self, parameters: Sequence[Tensor], seed: int = 1):
        self.likes = [parameter.detach() for parameter in parameters]
        self.seed = seed

    def gradients(self, points: Sequence[Tensor], t: int) -> list[Tensor]:
        """At float64 points, as float64 tensors holding values of the parameters' format."""
        generator = torch.Generator().manual_seed(1000 * self.seed + t)
        a = 0.02 * 3.0 ** (t % 5)
        out = []
        for like, point in zip(self.likes, points, strict=True):
            h = 0.5 + torch.rand(point.shape, dtype=torch.float64, generator=generator)
            z = torch.randn(point.shape, dtype=torch.float64, generator=generator)
            number_format = like.real.dtype if like.is_complex() else like.dtype
            out.append((a * h * (point.detach() - z)).to(number_format).to(torch.float64))
        return out

    def assign(self, parameters: Sequence[Tensor], t: int, present: Sequence[bool] | None = None) -> Tensor:
        """Sets `.grad` from where the parameters stand now."""
        gradients = self.gradients([real(p) for p in parameters], t)
        for i, (p, g) in enumerate(zip(parameters, gradients, strict=True)):
            p.grad = None
            if present is None or present[i]:
                p.grad = torch.view_as_complex(g).to(p.dtype) if p.is_complex() else g.to(p.dtype)
        return torch.zeros(())


def drive(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[Tensor],
    oracle: Oracle,
    *,
    exact: bool,
    num_steps: int = 20,
    problem: MinibatchQuadratic | None = None,
    present: Callable[[int], Sequence[bool]] | None = None,
    lr: Callable[[int], float] | None = None,
    after_step: Callable[[int], Any],
) -> None:
    """Takes the same steps with both; `after_step(t)` compares."""
    problem = problem or MinibatchQuadratic(parameters)
    for t in range(num_steps):
        mask = list(present(t)) if present else [True] * len(parameters)
        if lr is not None:
            for group in optimizer.param_groups:
                group["lr"] = lr(t)

        def masked(gradients: list[Tensor], mask: Sequence[bool] = mask) -> Gradients:
            return [g if keep else None for g, keep in zip(gradients, mask, strict=True)]

        here = masked(problem.gradients(oracle.x, t))
        if exact:
            there = masked(problem.gradients(oracle.previous_weights(), t))
            oracle.step(here, there, lr=lr(t) if lr else None)
            optimizer.step(lambda t=t, mask=mask: problem.assign(parameters, t, mask))  # type: ignore[arg-type]
        else:
            oracle.step(here, lr=lr(t) if lr else None)
            problem.assign(parameters, t, mask)
            optimizer.step()
        after_step(t)


def assert_close(actual: Tensor, expected: Tensor, *, atol: float, rtol: float = 0.0, what: str = "") -> None:
    torch.testing.assert_close(real(actual), expected, atol=atol, rtol=rtol, msg=lambda text: f"{what}: {text}")


def cosine(start: float, end: float, num_steps: int) -> Callable[[int], float]:
    return lambda t: end + (start - end) * (1 + math.cos(math.pi * min(t / num_steps, 1.0))) / 2


def linear(start: float, end: float, num_steps: int) -> Callable[[int], float]:
    return lambda t: start + (end - start) * min(t / num_steps, 1.0)


def momentum(optimizer: torch.optim.Optimizer, p: Tensor) -> Tensor:
    """m_t, also where e_t is kept instead: m_t = (1-gamma) e_t + gamma g_t; to be called right after the step."""
    state = optimizer.state[p]
    if "exp_avg" in state:
        return state["exp_avg"]
    assert p.grad is not None
    gamma = optimizer.param_groups[0]["gamma"]
    return (1 - gamma) * state["exp_avg_grad"] + gamma * p.grad
