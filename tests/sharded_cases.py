"""The rows of the equality table: which layouts, types and options are checked, and how far they may differ."""

from __future__ import annotations

import torch

from sharded_training import Case

LAYOUTS = {
    2: ("ddp", "ddp + sharded state", "fsdp", "tp"),
    4: ("ddp", "ddp + sharded state", "fsdp", "hsdp 2x2", "fsdp 2 x tp 2"),
}


def _cases() -> list[Case]:
    cases: list[Case] = []
    for world, layouts in LAYOUTS.items():
        for layout in layouts:
            cases += [Case(layout, mars_type, world) for mars_type in ("adamw", "lion", "shampoo", "m")]
            if layout != "ddp + sharded state":
                cases += [Case(layout, t, world, {"is_approx": False}) for t in ("adamw", "m")]
    for layout in ("ddp", "fsdp", "fsdp 2 x tp 2"):
        cases.append(Case(layout, "m", 4, {"gather_matrices": True}))
        cases.append(Case(layout, "m", 4, {"clip_norm": None, "fused": False}))
    # Without a global norm to be measured anyway, the clip of each tensor has to ask for its own.
    cases += [Case(layout, t, 2, {"max_grad_norm": None}) for layout in ("ddp", "fsdp") for t in ("adamw", "m")]
    cases.append(Case("fsdp 2 x tp 2", "adamw", 4, {"max_grad_norm": None}))
    # Whoever owns a parameter keeps its gradient's memory, and must tell the others of it all the same.
    cases += [Case("ddp + sharded state", t, 2, {"donate_grads": True}) for t in ("adamw", "m")]
    for layout in ("ddp + sharded state", "hsdp 2x2"):
        cases.append(Case(layout, "adamw", 4, {"skip_nonfinite": True}))
        cases.append(Case(layout, "adamw", 4, {"state_precision": "8bit"}, tolerance=0.1))
        # Momenta travel in bfloat16 there. Singular values end within 0.03 of 1: 20 steps of 0.02 move weights 0.01
        # apart, and different weights have different gradients.
        cases.append(Case(layout, "m", 4, {"polar_dtype": torch.bfloat16}, "float32", tolerance=0.03))
    for layout in ("ddp", "ddp + sharded state", "fsdp", "hsdp 2x2"):
        cases += [Case(layout, t, 4, check="count") for t in ("adamw", "m")]
    coded = {"exchange_precision": "8bit"}
    for world, layouts in LAYOUTS.items():
        for layout in layouts:
            if layout != "ddp + sharded state":
                cases.append(Case(layout, "m", world, coded, check="oracle"))
                # Each code is off by up to 3% of its piece's largest element, three times the typical one, so a
                # step by 0.0004; and small singular values of the momentum have other directions.
                cases.append(Case(layout, "m", world, coded, tolerance=0.05))
            if layout in ("ddp", "fsdp", "hsdp 2x2"):
                cases.append(Case(layout, "m", world, coded, check="count"))
    for layout in ("fsdp", "hsdp 2x2"):
        cases += [Case(layout, "m", 4, options, check="contain") for options in ({}, coded)]
    cases.append(Case("hsdp 2x2", "m", 4, coded, check="rounds", tolerance=0.05))
    for layout, to in (("fsdp", ("hsdp 2x2", "ddp", "alone")), ("ddp + sharded state", ("fsdp", "alone"))):
        cases += [Case(layout, t, 4, check="move", to=to) for t in ("adamw", "m")]
    cases += [Case("alone", t, 4, check="move", to=("fsdp", "ddp + sharded state", "ddp")) for t in ("adamw", "m")]
    cases.append(Case("fsdp", "adamw", 4, {"is_approx": False}, check="move", to=("hsdp 2x2", "alone")))
    eight_bits = {"state_precision": "8bit"}
    cases.append(Case("fsdp", "adamw", 4, eight_bits, tolerance=0.1, check="move", to=("hsdp 2x2", "alone")))
    cases.append(Case("any", "any", 2, check="refuse"))
    for layout in ("ddp + sharded state", "hsdp 2x2"):
        cases += [Case(layout, "m", 4, check="rounds"), Case(layout, "m", 4, {}, "mixed", 1e-5)]
    cases += [Case("tp", t, 2, check="partial") for t in ("adamw", "m")]
    return cases


CASES = _cases()
