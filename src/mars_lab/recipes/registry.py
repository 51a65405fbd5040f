"""The recipes by name."""

from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches

from mars_lab.errors import InputError
from mars_lab.recipes import cifar, gpt2, sotu
from mars_lab.recipes.recipe import Recipe
from mars_lab.recipes.scales import SCALES, scaled

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
