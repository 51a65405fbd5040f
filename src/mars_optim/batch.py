"""What one step works on: tensors that take the same step, and what that step is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .polar import MatrixView, PolarMethod
from .sharding import Spread
from .state import Key, key_of

Scalar = float | Tensor

# One factor for all tensors of a batch, or a tensor of shape (n,) with one for each.
Weight = Scalar


@dataclass(frozen=True)
class Treatment:
    """A group's hyperparameters after the rule for 1-D tensors and after evaluating the schedule of gamma.

    `gamma` is None where there is no gradient correction, hence no previous gradient. `lr` may be a 0-d tensor.
    `one_buffer`: unclipped approx MARS with constant gamma is m_t = (1-gamma) e_t + gamma g_t, where e_t is the
    average of the gradients; then e_t is all that is kept.
    """

    preconditioner: str
    update_scale: str
    gamma: Scalar | None
    one_buffer: bool
    clip_norm: float | None
    max_grad_norm: float | None
    beta1: float
    beta2: float
    lr: Scalar
    weight_decay: float
    eps: float
    amsgrad: bool
    polar: PolarMethod
    matrix_view: MatrixView
    matrix_transposed: bool
    param_rounding: str
    exchange_precision: str | None

    @property
    def rounds_params_stochastically(self) -> bool:
        """Whether rounding half-precision weights takes random numbers."""
        return self.param_rounding in ("stochastic", "remainder8")


@dataclass(frozen=True)
class LossScaling:
    """What a grad scaler leaves to a step that runs without the host: both are on the device."""

    scale: Tensor | None  # what the loss was multiplied by; None: the gradients are unscaled already
    found_inf: Tensor  # 1 where a gradient is not finite: then everything stays as it is


@dataclass
class Batch:
    """Lists of equal length over the tensors of one group that share treatment, device, dtypes and first step.

    Real throughout: complex tensors appear as (real, imaginary) pairs. Tensors are as stored: weights and gradients in
    any real format, state in the formats of `mars_optim.state`, each 8-bit tensor with its scales under
    `..._scale`. A backend either reads that or is given an unpacked copy, all of it in the arithmetic dtype: fp32 for
    half precision, else the parameters' own.
    """

    treatment: Treatment
    params: list[Tensor]
    grads: list[Tensor]  # g_t as it stands in p.grad; read only
    prev_grads: list[Tensor] | None  # g'_t, likewise raw; read only; None where d_t = 0
    next_grads: list[Tensor] | None  # approx: where g_t is to be copied for the next step
    steps: list[float] | list[Tensor]  # t = 1, 2, ...; tensors where the host must not know them
    # exp_avg (or exp_avg_grad), what the preconditioner keeps beside it, prev_grad_scale, param_remainder.
    state: dict[str, list[Tensor]]
    update_scales: list[float]
    owners: list[dict[str, Any]]  # the parameters' state dicts, for what is known only after the step
    sign: float = 1.0  # -1 under maximize
    first_steps: bool = False  # no previous gradient exists yet
    has_prev: list[Tensor] | None = None  # 0 or 1 a tensor, where the host must not know them
    prev_coefficients: list[Tensor] | None = None  # s' a tensor; None: 1
    salts: list[int] | None = None  # where rounding asks for random numbers: what sets each tensor's apart
    indices: list[int] | None = None  # among all parameters of the optimizer
    prev_norms: list[float] | None = None  # approx: ||g'||, inf where unknown
    norms: dict[int, float] | None = None  # where a backend that finds ||g|| leaves it for the next step, by index
    scaling: LossScaling | None = None
    moves_prev_grads: bool = False  # next_grads are not the states' yet: whoever writes them makes them so
    packed: Batch | None = None  # what this one was unpacked from
    spread: Spread | None = None  # the tensors are pieces of what ranks hold together, or copies of what all hold
    shapes: list[tuple[int, ...]] | None = None  # of the whole tensors

    # Set by `correction.weigh`: c~ = clip * (grad_weight * g + difference_weight * (ratio * g - g')).
    coefficient: Scalar = 1.0  # s: s g is the gradient "as the step saw it"
    grad_norms: Tensor | None = None  # ||g|| of each tensor where it is known before the step
    grad_weight: Weight = 1.0
    difference_weight: Weight = 0.0
    ratio: Weight = 1.0
    momentum_weights: tuple[Scalar, Scalar] = (1.0, 0.0)  # one-buffer form: of e_t and g_t in m_t
    clip: Weight | None = 1.0  # None: the backend measures ||c|| and clips to treatment.clip_norm as it goes

    @property
    def is_sharded(self) -> bool:
        """Whether the tensors are pieces, whose sums are not those of the whole."""
        return self.spread is not None and self.spread.shard_group is not None

    @property
    def keys(self) -> list[Key] | None:
        """The keys of the random numbers that rounding asks for; on the device where the step counts are."""
        if self.salts is None:
            return None
        counts = [t if isinstance(t, Tensor) else int(t) for t in self.steps]
        return [key_of(salt, count) for salt, count in zip(self.salts, counts, strict=True)]

    @property
    def momentum_name(self) -> str:
        """The name of the average that the momentum is, or is formed from."""
        return "exp_avg_grad" if self.treatment.one_buffer else "exp_avg"
