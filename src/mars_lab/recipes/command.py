"""`mars recipes`: which there are, and what one of them is."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import groupby
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from mars_lab.errors import InputError
from mars_lab.recipes import registry, sotu
from mars_lab.recipes.recipe import Recipe
from mars_lab.recipes.registry import DEFAULT, RECIPES
from mars_lab.recipes.scales import SCALES


@dataclass(frozen=True)
class ListCommand:
    """List the recipes that `mars train` takes. `mars recipes show NAME` prints every field of one."""

    pattern: tyro.conf.Positional[str | None] = None
    """Such as 'gpt2-small-owt-*' or '*exact*': only the recipes it fits. Without one, families are counted."""


@dataclass(frozen=True)
class ShowCommand:
    """Print every field of a recipe, and where it is from."""

    name: tyro.conf.Positional[str]
    """A recipe; <scale>/<recipe> is it made smaller."""


def main(args: list[str]) -> None:
    """Run `mars recipes` with `args`."""
    if args and args[0] == "show":
        show(tyro.cli(ShowCommand, args=args[1:], prog="mars recipes show").name)
        return
    pattern = tyro.cli(ListCommand, args=args, prog="mars recipes").pattern
    if pattern is None:
        _overview()
        return
    found = {name: recipe for name, recipe in RECIPES.items() if fnmatch(name, pattern)}
    if not found:
        raise InputError(f"no recipe fits {pattern!r}; `mars recipes` lists the families, '*' stands for anything")
    _print(found)


def show(name: str) -> None:
    """Print the recipe called `name`."""
    recipe = registry.find(name)
    print(f"{name}: {recipe.about}")
    print(f"For {recipe.hardware}.")
    for tokens, loss in recipe.published.items():
        unit = f"{tokens / 1e9:g} billion tokens" if tokens >= 10**9 else f"{tokens:,} images"
        print(f"Published validation loss after {unit}: {loss}")
    if recipe.published_accuracy is not None:
        print(f"Published test accuracy: {recipe.published_accuracy}%")
    for departure in recipe.departures:
        print(f"Mind: {departure}.")
    for field, value in _fields(dataclasses.asdict(recipe.config)):
        print(f"  {field} = {json.dumps(value)}")


def _fields(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _fields(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def _overview() -> None:
    small = sotu.recipes()
    _print(small)
    print("\nPublished runs: 'mars recipes PATTERN' lists them, 'mars recipes show NAME' says all about one.")
    for family, names in groupby((name for name in RECIPES if name not in small), key=registry.family):
        members = list(names)
        print(f"  {family + '-*':18} {len(members):3}   {members[0]}, ...")
    print(f"\nEach also smaller, as {', '.join(f'{scale}/NAME' for scale in SCALES)}:")
    for scale, about in SCALES.items():
        print(f"  {scale:18} {about.hardware}")


def _print(recipes: Mapping[str, Recipe]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("recipe", no_wrap=True, min_width=max(map(len, recipes)) + len(" (default)"))
    for title in ("rate", "published", "what it is"):
        table.add_column(title)
    for name, recipe in recipes.items():
        mark = " (default)" if name == DEFAULT else ""
        figures = " ".join(f"{loss:g}" for loss in recipe.published.values())
        table.add_row(name + mark, f"{recipe.config.optimizer.lr:g}", figures, recipe.summary)
    Console().print(table)
