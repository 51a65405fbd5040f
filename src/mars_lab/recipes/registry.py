"""The recipes by name."""

from collections.abc import Callable
from difflib import get_close_matches

from mars_lab.errors import InputError
from mars_lab.recipes import sotu
from mars_lab.training.config import RunConfig

DEFAULT = "mars-m"

RECIPES: dict[str, Callable[[], RunConfig]] = {
    DEFAULT: sotu.mars_m,
    "adamw": sotu.adamw,
    "muon": sotu.muon,
    "mars-adamw": sotu.mars_adamw,
    "mars-lion": sotu.mars_lion,
    "mars-shampoo": sotu.mars_shampoo,
}


def recipe(name: str) -> RunConfig:
    """The recipe called `name`.

    Raises:
        InputError: there is none; the message names the nearest.
    """
    if name not in RECIPES:
        near = get_close_matches(name, RECIPES, n=3, cutoff=0.4) or list(RECIPES)
        raise InputError(f"no recipe {name!r}; nearest: {', '.join(near)} (all of them: `mars recipes`)")
    return RECIPES[name]()
