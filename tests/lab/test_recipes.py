"""The recipes against the papers' tables, typed in here once more."""

import dataclasses
import json

import pytest

from mars_lab.cli import main
from mars_lab.errors import InputError
from mars_lab.recipes import cifar, gpt2, sotu
from mars_lab.recipes.registry import DEFAULT, RECIPES, find, optimizers_beside
from mars_lab.recipes.scales import SCALES
from mars_lab.tasks.vision import VisionConfig
from mars_lab.training.config import RunConfig, from_dict
from mars_lab.training.optimizers import build


def test_the_small_recipes_differ_in_the_optimizer_only() -> None:
    base = find(DEFAULT).config
    for name, recipe in sotu.recipes().items():
        made = recipe.config
        assert made.optimizer.name == name
        assert (made.task, made.train) == (base.task, base.train)


def test_every_recipe_is_valid_and_survives_json() -> None:
    for name, recipe in RECIPES.items():
        config = recipe.config
        assert from_dict(RunConfig, json.loads(json.dumps(dataclasses.asdict(config)))) == config, name
        assert recipe.summary.endswith("."), name
    assert len(RECIPES) > 350


@pytest.mark.parametrize(
    ("name", "lr", "lr_1d", "decay", "min_lr"),
    [
        ("gpt2-small-owt-adamw", 6e-4, None, 0.1, 3e-5),
        ("gpt2-medium-owt-adamw", 3e-4, None, 0.1, 6e-5),
        ("gpt2-large-owt-mars-adamw", 2e-3, 1e-3, 0.01, 1e-5),
        ("gpt2-xl-fwe-mars-adamw", 2e-3, 1e-3, 0.01, 1e-5),
        ("gpt2-small-owt-muon", 2e-2, 3e-3, 0.0, 0.0),
        ("gpt2-small-fwe-mars-m", 1e-2, None, 0.01, 3e-5),
        ("gpt2-xl-fwe-moonlight", 3e-3, 3e-3, 0.1, 1e-5),
    ],
)
def test_the_published_rates(name: str, lr: float, lr_1d: float | None, decay: float, min_lr: float) -> None:
    config = find(name).config
    optimizer, train = config.optimizer, config.train
    assert (optimizer.lr, optimizer.lr_1d, optimizer.weight_decay) == (lr, lr_1d, decay)
    assert train.final_lr_ratio * lr == pytest.approx(min_lr)
    assert train.batch_size * train.num_accumulation_steps * config.language.model.context_length == 480 * 1024
    assert train.warmup_fraction * train.num_steps == 2000
    assert (train.num_steps, train.seed, optimizer.max_grad_norm) == (100_000, 5000, 1.0)


def test_every_shampoo_is_shampoo(capsys: pytest.CaptureFixture[str]) -> None:
    found = {name: recipe.config.optimizer for name, recipe in RECIPES.items() if "-shampoo" in name}
    own = {name: optimizer for name, optimizer in found.items() if "mars-shampoo" not in name}
    assert len([name for name in own if name.startswith("cifar")]) == 4
    assert {optimizer.name for optimizer in own.values()} == {"shampoo"}
    assert {optimizer.betas[0] for optimizer in own.values()} == {0.9}
    assert own["cifar100-cnn-shampoo"].lr == max(cifar.LR_GRID)
    main(["recipes", "show", "cifar10-resnet18-shampoo"])
    assert "which Shampoo the published figure is of was not said" in capsys.readouterr().out


def test_variants_differ_from_their_recipe_in_what_they_are_named_after() -> None:
    base = find("gpt2-small-owt-mars-adamw").config
    exact = find("gpt2-small-owt-mars-adamw-exact").config
    assert exact == dataclasses.replace(base, optimizer=dataclasses.replace(base.optimizer, mode="exact"))
    gamma = find("gpt2-small-owt-mars-adamw-gamma-0.1-to-0").config.optimizer
    assert gamma == dataclasses.replace(base.optimizer, gamma=0.1, final_gamma=0.0)
    short = find("gpt2-small-owt-mars-adamw-5b").config
    assert short.train.num_steps * 480 * 1024 == pytest.approx(5e9, rel=0.02)
    assert short.train.warmup_fraction * short.train.num_steps == 2000
    wsd = find("gpt2-small-fwe-mars-adamw-wsd").config.train
    assert (wsd.schedule, wsd.decay_fraction, wsd.final_lr_ratio) == ("wsd", 0.2, 0.0)


def test_published_figures_are_at_the_recipes_that_they_are_of() -> None:
    assert find("gpt2-small-owt-mars-adamw-exact").published == {5 * 10**9: 3.107, 20 * 10**9: 2.980, 50 * 10**9: 2.847}
    assert find("gpt2-xl-fwe-mars-m").published == {50 * 10**9: 2.379}
    assert not find("gpt2-xl-owt-mars-m").published
    assert not find("gpt2-small-owt-adamw-5b").published, "that figure is a point of the longer run"
    resnet = find("cifar100-resnet18-mars-lion-exact")
    assert (resnet.published, resnet.published_accuracy) == ({200 * 50_000: 0.991}, 76.15)
    assert find("cifar10-cnn-adamw").published_accuracy is None


def test_the_rule_of_the_scales() -> None:
    for size, row in gpt2.SIZES.items():
        for scale, divisors in SCALES.items():
            model = find(f"{scale}/gpt2-{size}-owt-mars-m").config.language.model
            assert model.width == row.width // divisors.width
            assert model.num_layers == row.num_layers // divisors.layers
    published, small = (find(f"{scale}gpt2-small-owt-mars-adamw").config for scale in ("", "cpu/"))
    assert small.optimizer == dataclasses.replace(published.optimizer, lr=6 * 6e-3, lr_1d=6 * 3e-3)
    model = small.language.model
    assert (model.num_layers, model.num_heads, model.width, model.context_length) == (4, 2, 128, 128)
    assert small.train.num_steps == 125
    assert find("gpu-hour/gpt2-small-owt-mars-adamw").config.optimizer == published.optimizer
    vision = find("cpu/cifar10-resnet18-adamw").config
    assert isinstance(vision.task, VisionConfig)
    assert vision.task.model.width == 16
    assert vision.optimizer == cifar.OPTIMIZERS["adamw"]


def test_the_learning_rate_falls_at_half_and_at_three_quarters() -> None:
    config = find("cpu/cifar10-cnn-adamw").config
    assert isinstance(config.task, VisionConfig)
    from mars_lab.models import images

    stepper = build(images.build(config.task.model, 10), config.optimizer, config.train)
    steps = config.train.num_steps
    rates = [stepper._multiplier(step) for step in (0, steps // 2 - 1, steps // 2, steps * 3 // 4, steps - 1)]
    assert rates == pytest.approx([1, 1, 0.1, 0.01, 0.01])


def test_gamma_moves_with_the_steps() -> None:
    config = find("cpu/gpt2-small-owt-mars-adamw-gamma-0.1-to-0").config
    from mars_lab.models.gpt2 import GPT2

    stepper = build(GPT2(config.language.model), config.optimizer, config.train)
    gamma = stepper.parts[0].param_groups[0]["gamma"]
    assert [gamma(step) for step in (0, 50, 125)] == pytest.approx([0.1, 0.06, 0.0])


def test_recipes_are_listed_counted_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes"])
    overview = capsys.readouterr().out
    assert all(name in overview for name in (*sotu.recipes(), "gpt2-small-owt-*", "cifar100-cnn-*", "cpu/NAME"))
    main(["recipes", "cifar10-resnet18-*"])
    assert capsys.readouterr().out.count("cifar10-resnet18-") == 12
    main(["recipes", "show", "gpt2-small-owt-mars-m"])
    shown = capsys.readouterr().out
    assert "2.841" in shown
    assert "their table says 0.1" in shown
    fields = {line.split(" = ")[0].strip() for line in shown.splitlines() if " = " in line}
    config = find("gpt2-small-owt-mars-m").config
    assert {f"optimizer.{field.name}" for field in dataclasses.fields(config.optimizer)} <= fields
    assert {f"train.{field.name}" for field in dataclasses.fields(config.train)} <= fields


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpt2-small-owt-mars", "nearest: gpt2-small-owt-mars"),
        ("tpu/gpt2-small-owt-mars-m", "no scale 'tpu'; known: cpu, gpu-minutes, gpu-hour"),
        ("cpu/adamw", "adamw is small already"),
    ],
)
def test_names_that_are_no_recipe(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find(name)


def test_a_pattern_that_fits_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["recipes", "llama-*"])
    assert "no recipe fits 'llama-*'" in capsys.readouterr().err


def test_the_optimizers_beside_a_recipe() -> None:
    beside = optimizers_beside("cpu/gpt2-small-owt-mars-m")
    nine = {"adamw", "muon", "moonlight", "lion", "shampoo", "mars-adamw", "mars-lion", "mars-shampoo", "mars-m"}
    assert nine <= beside.keys()
    assert beside["adamw"].lr == pytest.approx(6 * 6e-4)
    assert not [name for name in beside if name.endswith(("-5b", "-20b"))]
    assert optimizers_beside("adamw").keys() == sotu.recipes().keys()
    assert {*cifar.OPTIMIZERS} <= optimizers_beside("cifar100-cnn-lion").keys()
