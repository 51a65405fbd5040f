"""Shampoo against its definition in other words, and against a library where that computes the same."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_optimizer import Shampoo as LibraryShampoo
from torch import Tensor

from mars_lab.errors import DivergenceError, InputError
from mars_lab.models import images
from mars_lab.models.images import ImageModelConfig
from mars_lab.sweep import space
from mars_lab.training import optimizers
from mars_lab.training.config import OptimizerConfig, RunConfig, TrainConfig
from mars_lab.training.shampoo import Shampoo, inverse_root

SHAPES = [(6, 4), (3, 7), (5, 3, 2), (4, 3, 3, 2), (6, 4, 1, 1), (5,)]


def gradients(shape: tuple[int, ...], count: int = 9) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(count)]


def stepped(optimizer: Any, parameter: Tensor, grads: list[Tensor]) -> Tensor:
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()
    return parameter.detach()


def power(matrix: np.ndarray, exponent: float) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return vectors @ np.diag(values**exponent) @ vectors.T


def by_definition(start: Tensor, grads: list[Tensor], options: dict[str, Any]) -> np.ndarray:
    """With one matrix over the flattened tensor: the Kronecker product of the roots."""
    x = start.numpy().astype(float)
    shape = [size for size in x.shape if size > 1] or [1]
    order = len(shape)
    letters = "abcd"[:order]
    statistics = [options["eps"] * np.eye(size) for size in shape]
    roots, momentum = [np.eye(size) for size in shape], np.zeros(shape)
    for step, grad in enumerate(grads):
        g = grad.numpy().reshape(shape)
        momentum = options["momentum"] * momentum + (1 - options["momentum"]) * g
        for dim, letter in enumerate(letters):
            product = np.einsum(f"{letters},{letters.replace(letter, 'z')}->{letter}z", g, g)
            is_diagonal = shape[dim] > options["max_size"]
            statistics[dim] += np.diag(np.diag(product)) if is_diagonal else product
            if step < options["interval"] or (step + 1) % options["interval"] == 0:
                roots[dim] = power(statistics[dim], -1 / (2 * order))
        whole = np.ones((1, 1))
        for root in roots:
            whole = np.kron(whole, root)
        x = x - options["lr"] * ((whole @ momentum.ravel()).reshape(x.shape) + options["weight_decay"] * x)
    return x


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "changes",
    [{}, {"momentum": 0.0}, {"interval": 3}, {"max_size": 3}, {"weight_decay": 0.2, "eps": 0.3}],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_it_is_its_definition(shape: tuple[int, ...], changes: dict[str, Any]) -> None:
    options = {"lr": 0.1, "momentum": 0.9, "eps": 1e-3, "weight_decay": 0.0, "interval": 1, "max_size": 100, **changes}
    start = gradients(shape, 10)[-1]
    parameter = start.clone().requires_grad_()
    found = stepped(Shampoo([parameter], **options), parameter, gradients(shape))
    # Float64 carries 16 digits; roots of matrices whose eigenvalues span five orders lose some.
    np.testing.assert_allclose(found.numpy(), by_definition(start, gradients(shape), options), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shape", [(6, 4), (3, 7), (5, 3, 2), (4, 3, 3, 2)], ids=str)
def test_it_is_the_librarys_without_momentum(shape: tuple[int, ...]) -> None:
    """With momentum, pytorch_optimizer's averages gradients with updates that are preconditioned already."""
    ours, theirs = (torch.ones(shape, dtype=torch.float64).requires_grad_() for _ in range(2))
    optimizer = Shampoo([ours], lr=0.1, momentum=0.0, eps=1e-4, weight_decay=0.2, interval=1)
    library = LibraryShampoo([theirs], lr=0.1, matrix_eps=1e-4, weight_decay=0.2, weight_decouple=True)
    found, expected = (stepped(o, p, gradients(shape)) for o, p in ((optimizer, ours), (library, theirs)))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_roots_of_fp32_statistics_are_computed_in_float64() -> None:
    """Eigenvalues span 1 to 1e-7 here: in fp32 those of the smallest would be rounding alone."""
    directions = torch.linalg.qr(gradients((40, 40), 1)[0]).Q
    statistics = (directions * torch.logspace(0, -7, 40, dtype=torch.float64) @ directions.T).float()
    expected = power(statistics.double().numpy() + 1e-8 * np.eye(40), -0.25)
    np.testing.assert_allclose(inverse_root(statistics, 4, 1e-8).numpy(), expected, rtol=1e-5, atol=1e-5)


def test_saved_and_loaded_it_continues_bit_for_bit() -> None:
    grads = [grad.float() for grad in gradients((4, 3, 3, 2), 8)]
    straight, resumed = (torch.ones(4, 3, 3, 2).requires_grad_() for _ in range(2))
    first, second = (Shampoo([p], interval=3) for p in (straight, resumed))
    stepped(first, straight, grads[:4])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    resumed.data.copy_(straight.data)
    assert torch.equal(stepped(first, straight, grads[4:]), stepped(second, resumed, grads[4:]))


def test_what_is_not_finite_is_said() -> None:
    parameter = torch.ones(3, 3).requires_grad_()
    with pytest.raises(DivergenceError, match="not finite"):
        inverse_root(torch.full((3,), math.inf), 2, 1e-4)
    with pytest.raises(DivergenceError, match=r"preconditioner of Shampoo .* lower --optimizer.lr"):
        stepped(Shampoo([parameter]), parameter, [torch.full((3, 3), math.nan)])


def test_convolutions_and_the_head_are_shampoos_norms_and_biases_adamws() -> None:
    model = images.build(ImageModelConfig("cnn", width=4), 10)
    config = OptimizerConfig("shampoo", lr=0.1, lr_1d=1e-3, betas=(0.8, 0.9), shampoo_eps=0.5, shampoo_interval=7)
    shampoo, adamw = optimizers.build(model, config, TrainConfig()).parts
    (group,) = shampoo.param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters() if p.dim() > 1}
    assert (group["momentum"], group["eps"], group["interval"]) == (0.8, 0.5, 7)
    rest = {id(p) for g in adamw.param_groups for p in g["params"]}
    assert rest == {id(p) for p in model.parameters() if p.dim() == 1}


@pytest.mark.parametrize(
    ("optimizer", "train", "message"),
    [
        ({}, {"parallel": "fsdp"}, r"--parallel fsdp is not for shampoo.*use --parallel ddp"),
        ({}, {"parallel": "tp"}, r"--parallel tp is not for shampoo.*or --optimizer.name mars-shampoo"),
        ({}, {"precision": "bf16-params"}, r"bf16-params is not for shampoo.*use bf16"),
        ({"mode": "exact"}, {}, "mode=exact is for the MARS types, not for 'shampoo'"),
        ({"shampoo_eps": 0.0}, {}, r"optimizer\.shampoo_eps must be above 0, got 0\.0"),
        ({"shampoo_interval": 0}, {}, r"optimizer\.shampoo_interval must be at least 1, got 0"),
    ],
)
def test_what_it_cannot_do_is_refused(optimizer: Any, train: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        RunConfig(optimizer=OptimizerConfig("shampoo", **optimizer), train=TrainConfig(**train))


def test_its_eps_is_swept_for_it_alone() -> None:
    both = {"shampoo": OptimizerConfig("shampoo"), "adamw": OptimizerConfig("adamw")}
    assert space.spaces(both, ["shampoo:shampoo_eps=1e-4,1e-6"], 1, 2.0)["shampoo"]["shampoo_eps"] == [1e-6, 1e-4]
    with pytest.raises(InputError, match=r"adamw has no shampoo_eps; .* as in shampoo:shampoo_eps=1e-4"):
        space.spaces(both, ["shampoo_eps=1e-4"], 1, 2.0)
