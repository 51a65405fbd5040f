"""GPT-2 with 2.6 million parameters on the State of the Union addresses: minutes on two cores.

Every recipe here trains the same model on the same tokens; only the optimizer differs. The learning rates of
MARS-M and AdamW come from the same sweep (see `docs/training.md`).
"""

from dataclasses import replace

from mars_lab.training.config import OptimizerConfig, RunConfig


def mars_m() -> RunConfig:
    """MARS-M: orthogonalised momentum of the corrected gradient.

    Embeddings and norms have half the matrices' rate, the ratio of the published GPT-2 runs.
    """
    return RunConfig(optimizer=OptimizerConfig(name="mars-m", lr=0.02, lr_1d=0.01))


def adamw() -> RunConfig:
    """torch.optim.AdamW, tuned with the same effort as the default."""
    optimizer = OptimizerConfig(name="adamw", lr=3e-3, betas=(0.9, 0.95))
    return replace(mars_m(), optimizer=optimizer)


def muon() -> RunConfig:
    """torch.optim.Muon on hidden matrices, torch.optim.AdamW on the rest."""
    base = mars_m()
    return replace(base, optimizer=replace(base.optimizer, name="muon"))


def mars_adamw() -> RunConfig:
    """MARS-AdamW: AdamW's two moments of the corrected gradient."""
    base = mars_m()
    return replace(base, optimizer=replace(base.optimizer, name="mars-adamw", lr=6e-3, lr_1d=3e-3))


def mars_lion() -> RunConfig:
    """MARS-Lion: the sign of the corrected gradient's momentum."""
    base = mars_m()
    return replace(base, optimizer=replace(base.optimizer, name="mars-lion", lr=1e-3, lr_1d=3e-3))


def mars_shampoo() -> RunConfig:
    """MARS-Shampoo: MARS-M with the update scaled by sqrt(max(1, rows / cols)).

    This scale makes the update of a 192-wide matrix 2.8 times smaller than MARS-M's; the rate makes up for it.
    """
    base = mars_m()
    return replace(base, optimizer=replace(base.optimizer, name="mars-shampoo", lr=0.055))
