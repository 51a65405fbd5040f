"""What one step works on: tensors that take the same step, and what that step is."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .polar import MatrixView, PolarMethod

Scalar = float | Tensor

# One factor for all tensors of a batch, or one 0-d tensor for each.
Weight = Scalar | list[Tensor]


@dataclass(frozen=True)
class Treatment:
    """A group's hyperparameters after the rule for 1-D tensors and after evaluating the schedule of gamma.

    `gamma` is None where there is no gradient correction, hence no previous gradient. `lr` may be a 0-d tensor.
    """

    preconditioner: str
    update_scale: str
    gamma: Scalar | None
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


@dataclass
class Batch:
    """Lists of equal length over the tensors of one group that share treatment, device, dtype and first step.

    Real throughout: complex tensors appear as (real, imaginary) pairs. `params` have the parameters' dtype,
    everything else the arithmetic dtype: fp32 for half precision, else the parameters' own.
    """

    treatment: Treatment
    params: list[Tensor]
    grads: list[Tensor]  # g_t
    prev_grads: list[Tensor] | None  # g'_t; None where d_t = 0
    next_grads: list[Tensor] | None  # approx: where g_t is kept for the next step
    steps: list[float] | list[Tensor]  # t = 1, 2, ...; tensors where the host must not know them
    state: dict[str, list[Tensor]]  # exp_avg and what the preconditioner keeps beside it
    update_scales: list[float]
    has_prev: list[Tensor] | None = None  # 0 or 1 a tensor, where the host must not know them

    # Set by `correction.weigh`: with s g_t the gradient "as the step saw it",
    # c~_t = clip * (s g_t + kappa * (s g_t - g'_t)).
    grad_coefficient: Scalar = 1.0  # s
    kappa: Weight = 0.0
    clip: Weight = 1.0

    @property
    def is_clipped_globally(self) -> bool:
        """Whether s is still to be found from the norm of all gradients."""
        return self.treatment.max_grad_norm is not None

    @property
    def is_half(self) -> bool:
        """Whether the parameters are in half precision, so that weights are updated in fp32 and rounded once."""
        return self.params[0].dtype != self.grads[0].dtype
