"""The optimizers of the papers' tables that are not MARS, as torch's own or as the point of MARS that equals them.

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
    """Shampoo without accumulation, of the momentum: MARS-Shampoo with gamma = 0 and without its clip.

    That a Shampoo step without accumulated preconditioners is the polar factor: Bernstein and Newhouse, 2024. The
    papers' Shampoo accumulates them; no reproduction of its row should be expected of this.
    """
    return OptimizerConfig(
        "mars-shampoo", lr=lr, lr_1d=lr_1d, label="shampoo", gamma=0.0, clip_norm=None, weight_decay=weight_decay
    )
