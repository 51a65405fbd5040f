"""Every table and figure of both papers, by name."""

from collections.abc import Mapping
from difflib import get_close_matches

from mars_lab.errors import InputError
from mars_lab.reproduce import mars, mars_m
from mars_lab.reproduce.exhibit import Exhibit, Unreproducible

EXHIBITS: Mapping[str, Exhibit] = {exhibit.name: exhibit for exhibit in (*mars.exhibits(), *mars_m.exhibits())}
UNREPRODUCIBLE: Mapping[str, Unreproducible] = {
    entry.name: entry for entry in (*mars.UNREPRODUCIBLE, *mars_m.UNREPRODUCIBLE)
}


def find(name: str) -> Exhibit:
    """The table or figure called `name`.

    Raises:
        InputError: there is none, with the nearest names; or it has nothing to measure, with the reason.
    """
    if name in UNREPRODUCIBLE:
        entry = UNREPRODUCIBLE[name]
        raise InputError(f"{name} ({entry.where}) can't be reproduced: {entry.reason}")
    if name not in EXHIBITS:
        near = get_close_matches(name, EXHIBITS, n=3, cutoff=0.4) or list(EXHIBITS)[:3]
        raise InputError(f"no table or figure {name!r}; nearest: {', '.join(near)} (all of them: `mars reproduce`)")
    return EXHIBITS[name]
