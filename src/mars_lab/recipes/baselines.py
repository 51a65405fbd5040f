"""The optimizers of the papers' tables that are not MARS: torch's own, the point of MARS that equals them, or Shampoo.

The identities are tests (`tests/test_identities.py`).
"""

from mars_lab.training.config import OptimizerConfig

LION_BETAS = (0.9, 0.99)
"""Of the interpolation and of the momentum, as published (Chen et al., 2023)."""


def adamw(lr: float, weight_decay: float) -> OptimizerConfig:
    """torch.optim.AdamW with the betas of GPT-2's trainings."""
    return OptimizerConfig("adamw", lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay)


def muon(lr: float, lr_1d: float) -> OptimizerConfig:
    """torch.optim.Muon as first published: Nesterov momentum, updates scaled by sqrt(max(1, rows / cols)), no decay."""
    return OptimizerConfig("muon", lr=lr, lr_1d=lr_1d, weight_decay=0.0, muon_scale="spectral")


def moonlight(lr: float, lr_1d: float, weight_decay: float) -> OptimizerConfig:
    """torch.optim.Muon with Moonlight's scale, 0.2 sqrt(max(rows, cols)), and decay (Liu et al., 2025)."""
    return OptimizerConfig("muon", lr=lr, lr_1d=lr_1d, weight_decay=weight_decay, label="moonlight")


def muon_of_convolutions(lr: float, lr_1d: float, weight_decay: float) -> OptimizerConfig:
    """Muon where weights have four dimensions, which torch's refuses: the point of MARS that equals it.

    Approx polar with gamma = 1 - mu from a zero start is Nesterov momentum mu, orthogonalised.
    """
    mu = 0.95
    return OptimizerConfig(
        "mars-shampoo",
        lr=lr,
        lr_1d=lr_1d,
        betas=(mu, 0.99),
        label="muon",
        gamma=1 - mu,
        first_step="zero",
        clip_norm=None,
        weight_decay=weight_decay,
    )


def lion(lr: float, lr_1d: float, weight_decay: float) -> OptimizerConfig:
    """Lion: the point of MARS-Lion with beta = b2, gamma = (b2 - b1) / b2 and a zero start."""
    b1, b2 = LION_BETAS
    return OptimizerConfig(
        "mars-lion",
        lr=lr,
        lr_1d=lr_1d,
        betas=(b2, 0.99),
        label="lion",
        gamma=(b2 - b1) / b2,
        first_step="zero",
        clip_norm=None,
        weight_decay=weight_decay,
    )


def shampoo(lr: float, lr_1d: float, weight_decay: float) -> OptimizerConfig:
    """Shampoo with accumulated preconditioners and the momentum of its experiments (Gupta et al., 2018).

    The papers don't say which Shampoo theirs is, and the authors' scripts have none.
    """
    return OptimizerConfig("shampoo", lr=lr, lr_1d=lr_1d, betas=(0.9, 0.99), weight_decay=weight_decay)
