"""Splitting a model into parameter groups: which tensor gets which treatment, and why.

`param_groups` returns groups for `MARS` that cover every trainable parameter exactly once, and an audit to print.
For the elementwise types (`adamw`, `lion`) every tensor with two or more dimensions is corrected and only norms and
biases are AdamW's. For the matrix types (`shampoo`, `m`) it decides for each tensor whether it is a matrix that
should be orthogonalised, and which matrices it holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from .polar import MatrixView, matrices
from .preconditioners import PRECONDITIONERS
from .presets import preset
from .roles import Found, Role, role_of, survey

ADAMW = "adamw"
MATRIX = "matrix"


@dataclass(frozen=True)
class AuditRow:
    """One parameter: its names (several if tied), shape, group and the reason for it."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    group: str
    why: str


@dataclass(frozen=True)
class Audit:
    """Every trainable parameter with its group; `print` it."""

    rows: tuple[AuditRow, ...]
    num_frozen: int

    def __str__(self) -> str:
        header = ("parameter", "shape", "group", "why")
        table = [header] + [
            (" = ".join(r.names), "x".join(map(str, r.shape)) or "scalar", r.group, r.why) for r in self.rows
        ]
        widths = [max(len(row[i]) for row in table) for i in range(3)]
        lines = ["  ".join([*(row[i].ljust(widths[i]) for i in range(3)), row[3]]) for row in table]
        sizes: dict[str, int] = {}
        for row in self.rows:
            sizes[row.group] = sizes.get(row.group, 0) + math.prod(row.shape)
        totals = ", ".join(f"{group}: {count:,}" for group, count in sizes.items())
        return "\n".join([*lines, f"total by group: {totals}; frozen tensors: {self.num_frozen}"])


class ParamGroups(list[dict[str, Any]]):
    """Parameter groups with the audit of how they came about."""

    def __init__(self, groups: Sequence[dict[str, Any]], audit: Audit) -> None:
        super().__init__(groups)
        self.audit = audit


def param_groups(
    model: nn.Module,
    mars_type: str = "adamw",
    *,
    overrides: Mapping[str, str | Mapping[str, Any]] | None = None,
    num_heads: int | None = None,
    lr_1d: float | None = None,
    betas_1d: tuple[float, float] = (0.9, 0.95),
    weight_decay_1d: float = 0.0,
    **hyperparameters: Any,
) -> ParamGroups:
    """Split `model` into parameter groups for `MARS`.

    Args:
        model: any module; tied parameters count once, frozen ones are left out.
        mars_type: as for `MARS`; decides whether matrices are orthogonalised.
        overrides: from a shell-style pattern of parameter names to `"adamw"`, `"matrix"` (orthogonalise as one
            matrix), or a dict of hyperparameters (`{"matrix_view": ("split", 0, (64, 64))}`,
            `{"lr": 1e-4}`). The first pattern that matches a name decides.
        num_heads: attention heads; splits fused Q, K, V into single heads instead of three matrices.
        lr_1d: learning rate of the AdamW tensors, also of embeddings and heads. None: the group's lr.
        betas_1d: their betas.
        weight_decay_1d: weight decay of norms and biases; by default they have none. Embeddings and heads that are
            AdamW's keep `weight_decay`.
        hyperparameters: any others of `MARS`, for all groups.

    Returns:
        A list of group dicts; its `audit` prints name, shape, group and reason of every parameter.

    Raises:
        ValueError: a pattern matches no trainable parameter; a matrix type finds no matrix to orthogonalise; the
            model has no trainable parameter; sizes do not fit.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"param_groups splits a torch.nn.Module; got {type(model).__name__}")
    if num_heads is not None and (not isinstance(num_heads, int) or num_heads < 1):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"num_heads must be None or an integer >= 1; got {num_heads!r}")
    overrides = dict(overrides or {})
    orthogonalises = PRECONDITIONERS[preset(mars_type).preconditioner].matrix_only
    common = {**hyperparameters, "mars_type": mars_type, "lr_1d": lr_1d, "betas_1d": betas_1d}
    common["weight_decay_1d"] = weight_decay_1d
    members: dict[str, tuple[dict[str, Any], list[tuple[str, nn.Parameter]]]] = {}
    rows: list[AuditRow] = []
    unused = set(overrides)
    parameters, num_frozen = survey(model)
    for found in parameters:
        pattern = next((p for p in overrides if any(fnmatchcase(name, p) for name in found.names)), None)
        if pattern is None:
            role = role_of(found, num_heads)
        else:
            unused -= {p for p in overrides if any(fnmatchcase(name, p) for name in found.names)}
            role = _overridden(overrides[pattern], pattern, role_of(found, num_heads), found, mars_type)
        label, options = _options(role, found.parameter, orthogonalises=orthogonalises, common=common)
        if orthogonalises and role.view is not None and found.parameter.ndim >= 2:
            matrices(found.parameter.detach(), role.view)  # raises where the sizes do not fit
        members.setdefault(label, (options, []))[1].append((found.names[0], found.parameter))
        rows.append(AuditRow(found.names, tuple(found.parameter.shape), label, role.why))
    _check(unused, rows, mars_type, orthogonalises=orthogonalises)
    groups = [{**common, **options, "params": params} for options, params in members.values()]
    return ParamGroups(groups, Audit(tuple(rows), num_frozen))


def _overridden(override: str | Mapping[str, Any], pattern: str, role: Role, found: Found, mars_type: str) -> Role:
    why = f"pattern {pattern!r}"
    if override == ADAMW:
        return Role(None, why, is_override=True)
    is_options = isinstance(override, Mapping)
    if not is_options and override != MATRIX:
        raise ValueError(
            f"override {pattern!r} must be 'adamw', 'matrix' or a dict of hyperparameters; got {override!r}"
        )
    orthogonalises = PRECONDITIONERS[preset(mars_type).preconditioner].matrix_only
    wants_matrix = override == MATRIX or (is_options and "matrix_view" in override)
    if wants_matrix and (not orthogonalises or found.parameter.ndim < 2):
        raise ValueError(
            f"override {pattern!r} asks for a matrix, but {found.names[0]} has shape "
            f"{tuple(found.parameter.shape)} under mars_type={mars_type!r}; "
            "a matrix needs two dimensions and the type 'shampoo' or 'm'"
        )
    if not is_options:
        return Role("flatten", why, role.transposed, is_override=True)
    if "mars_type" in override:
        raise ValueError(f"override {pattern!r} cannot change mars_type; say 'adamw' or 'matrix', or split by hand")
    view: MatrixView | None = override.get("matrix_view", role.view)
    return Role(view, f"{why}; {role.why}", role.transposed, hyperparameters=tuple(override.items()))


def _options(
    role: Role, parameter: nn.Parameter, *, orthogonalises: bool, common: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Return the label of the group and what its hyperparameters differ in."""
    options: dict[str, Any] = {}
    own = dict(role.hyperparameters)
    if parameter.ndim < 2:
        label = "adamw 1-d"
        for name in ("betas", "weight_decay"):  # what a person means by them for a tensor that has only the 1-d ones
            if name in own:
                options[f"{name}_1d"] = own[name]
        if "lr" in own:
            options["lr_1d"] = None
    elif role.view is None and (orthogonalises or role.is_override):
        # The point gamma = 0, clip off of the same code, with the hyperparameters of the AdamW tensors.
        label = ADAMW
        options = {"preconditioner": ADAMW, "update_scale": "none", "gamma": 0.0, "clip_norm": None}
        options["betas"] = common["betas_1d"]
        if common["lr_1d"] is not None:
            options |= {"lr": common["lr_1d"], "lr_1d": None}
    elif orthogonalises:
        view = role.view or "flatten"
        label = f"{MATRIX} {view}" if isinstance(view, str) else f"{MATRIX} split {len(view[2])} along {view[1]}"
        options = {"matrix_view": view, "matrix_transposed": role.transposed}
        if not isinstance(view, str):
            label += f" of {view[2]}" if len(set(view[2])) > 1 else f" by {view[2][0]}"
        label += " transposed" if role.transposed else ""
    else:
        label = "corrected"
    label += "".join(f" {name}={value}" for name, value in own.items() if name != "matrix_view")
    return label, {**options, **own}


def _check(unused: set[str], rows: Sequence[AuditRow], mars_type: str, *, orthogonalises: bool) -> None:
    if not rows:
        raise ValueError("the model has no trainable parameter; set requires_grad=True on some")
    if unused:
        names = ", ".join(row.names[0] for row in rows[:5])
        raise ValueError(
            f"no trainable parameter matches the pattern {sorted(unused)[0]!r}; patterns are shell-style and match "
            f"whole names, such as {names}"
        )
    if orthogonalises and not any(row.group.startswith("matrix") for row in rows):
        raise ValueError(
            f"mars_type={mars_type!r} orthogonalises matrices, but this model has none outside embeddings, heads and "
            "1-d tensors; use mars_type='adamw', or name the matrices in overrides"
        )
