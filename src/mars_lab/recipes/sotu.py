"""GPT-2 with 2.6 million parameters on the State of the Union addresses: minutes on two cores.

Every recipe here trains the same model on the same tokens; only the optimizer differs. The learning rates of
MARS-M and AdamW come from the same sweep (see `docs/comparison.md`).
"""

from collections.abc import Mapping
from dataclasses import replace

from mars_lab.recipes.recipe import Recipe
from mars_lab.training.config import OptimizerConfig, RunConfig

MARS_M = OptimizerConfig(name="mars-m", lr=0.02, lr_1d=0.01)
"""Embeddings and norms have half the matrices' rate, the ratio of the published GPT-2 runs."""

_OPTIMIZERS = {
    "mars-m": (MARS_M, "MARS-M: orthogonalised momentum of the corrected gradient."),
    "adamw": (
        OptimizerConfig(name="adamw", lr=3e-3, betas=(0.9, 0.95)),
        "torch.optim.AdamW, tuned with the same effort as the default.",
    ),
    "muon": (replace(MARS_M, name="muon"), "torch.optim.Muon on hidden matrices, torch.optim.AdamW on the rest."),
    "mars-adamw": (
        replace(MARS_M, name="mars-adamw", lr=6e-3, lr_1d=3e-3),
        "MARS-AdamW: AdamW's two moments of the corrected gradient.",
    ),
    "mars-lion": (
        replace(MARS_M, name="mars-lion", lr=1e-3, lr_1d=3e-3),
        "MARS-Lion: the sign of the corrected gradient's momentum.",
    ),
    "mars-shampoo": (
        replace(MARS_M, name="mars-shampoo", lr=0.055),
        "MARS-Shampoo: MARS-M with the update scaled by sqrt(max(1, rows / cols)).\n"
        "This scale makes the update of a 192-wide matrix 2.8 times smaller than MARS-M's; the rate makes up for it.",
    ),
}


def recipes() -> Mapping[str, Recipe]:
    """One for each optimizer, by its name."""
    return {
        name: Recipe(lambda o=optimizer: RunConfig(optimizer=o), about)
        for name, (optimizer, about) in _OPTIMIZERS.items()
    }
