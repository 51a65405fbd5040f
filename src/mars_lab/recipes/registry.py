"""The recipes by name."""

from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches

from mars_lab.errors import InputError
from mars_lab.recipes import cifar, gpt2, sotu
from mars_lab.recipes.recipe import Recipe
from mars_lab.recipes.scales import SCALES, scaled
from mars_lab.training.config import OptimizerConfig

DEFAULT = "mars-m"

RECIPES: Mapping[str, Recipe] = {**sotu.recipes(), **gpt2.recipes(), **cifar.recipes()}


def find(name: str) -> Recipe:
    """The recipe called `name`; `<scale>/<name>` is it made smaller.

    Raises:
        InputError: there is none; the message names the nearest.
    """
    scale, _, base = name.rpartition("/")
    if scale and scale not in SCALES:
        raise InputError(f"no scale {scale!r}; known: {', '.join(SCALES)}, as in {next(iter(SCALES))}/{base}")
    if base not in RECIPES:
        near = get_close_matches(base, RECIPES, n=3, cutoff=0.4) or list(sotu.recipes())
        raise InputError(f"no recipe {base!r}; nearest: {', '.join(near)} (all of them: `mars recipes`)")
    recipe = RECIPES[base]
    if not scale:
        return recipe
    if base in sotu.recipes():
        raise InputError(f"{base} is small already; {', '.join(SCALES)} are scales of the published recipes")
    return replace(
        recipe,
        make=lambda: scaled(RECIPES[base].config, SCALES[scale]),
        about=f"{recipe.summary[:-1]}, at the scale of {SCALES[scale].hardware}.\n{recipe.about}",
        published={},
        published_accuracy=None,
        hardware=SCALES[scale].hardware,
    )


def optimizers_beside(name: str) -> dict[str, OptimizerConfig]:
    """The optimizers of the recipe called `name` and of those that differ from it in the optimizer, by their names.

    Beside `cpu/gpt2-small-owt-mars-m` these are `adamw`, `muon`, ..., at the scale's rates.
    """
    find(name)  # raises if there is none
    scale, slash, base = name.rpartition("/")
    prefix = "" if base in sotu.recipes() else f"{family(base)}-"
    beside = sotu.recipes() if not prefix else [other for other in RECIPES if other.startswith(prefix)]
    found: dict[str, OptimizerConfig] = {}
    for other in beside:
        optimizer = find(f"{scale}{slash}{other}").config.optimizer
        if optimizer not in found.values():  # a recipe of fewer tokens has the same
            found[other.removeprefix(prefix)] = optimizer
    return found


def family(name: str) -> str:
    """What a published recipe trains: its name up to the optimizer."""
    return "-".join(name.split("-")[: 3 if name.startswith("gpt2") else 2])
