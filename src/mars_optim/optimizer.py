"""MARS: gradient correction, momentum, preconditioned step."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, TypeVar, cast, overload

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from . import backends
from .batch import LossScaling
from .exact import PreviousGradients, all_gradients_finite, evaluated_at_previous
from .hyperparameters import Gamma, check, check_matrices
from .loading import check_loaded, restore_states, take_over, to_plain
from .members import names_of
from .polar import MatrixView
from .ranks import join
from .sharding import Replicas
from .state import drop_params, keep_params, shield
from .steps import Steps

Loss = TypeVar("Loss")  # whatever the closure returns: a float or a tensor


class MARS(Optimizer):
    r"""MARS optimizers: variance-reduced (exact) or gradient-corrected (approx) AdamW, Lion, Shampoo and Muon.

    For a tensor :math:`x_t` with gradient :math:`g_t`,

    .. math::
        c_t &= g_t + \gamma_t \tfrac{\beta_1}{1-\beta_1} (g_t - g'_t), \qquad
        \tilde c_t = c_t / \max(1, \|c_t\|_2 / \text{clip\_norm}) \\
        m_t &= \beta_1 m_{t-1} + (1-\beta_1) \tilde c_t \\
        x_{t+1} &= x_t - \eta_t (H_t^{-1} m_t + \lambda x_t)

    where :math:`g'_t` is the gradient of *this* minibatch at :math:`x_{t-1}` (exact) or the previous step's gradient
    (approx). :math:`H_t^{-1} m_t` is :math:`\hat m_t / (\sqrt{\hat v_t} + \epsilon)` for `adamw`, with
    :math:`v_t` the average of :math:`\tilde c_t^2`; :math:`\text{sign}(m_t)` for `lion`;
    :math:`U V^\top \sqrt{\max(1, r/c)}` for `shampoo` and :math:`0.2\, U V^\top \sqrt{\max(r, c)}` for `m`, with
    :math:`m_t = U S V^\top` of r rows and c columns. Only exact mode reduces variance: without clipping, approx is
    quasi-hyperbolic momentum.

    Tensors with fewer than two dimensions get AdamW with `betas_1d`, `lr_1d`, `weight_decay_1d` unless `optimize_1d`.
    Every hyperparameter may be given per group and is read from the group at each step.

    Args:
        params: tensors, (name, tensor) pairs or group dicts; see `param_groups` to split a model.
        lr: learning rate, a number >= 0 or a 1-element tensor.
        betas: decay of the momentum and (`adamw`) of the second moment, each in [0, 1).
        eps: added to the root of the second moment (outside of it, unlike the paper's print).
        weight_decay: decoupled decay, multiplied by lr.
        amsgrad: use the running maximum of the second moment (`adamw`).
        gamma: strength of the correction: a number, a 0-d tensor, or a schedule called with the number of steps
            already taken. The number 0 means no correction and no state for it.
        is_approx: approx mode; False is exact mode, which needs `step(closure)` or `previous_params()`.
        mars_type: `"adamw"`, `"lion"`, `"shampoo"` or `"m"`, also spelled `"mars-adamw"` etc.
        optimize_1d: give tensors with fewer than two dimensions MARS, too (`adamw` under matrix preconditioners).
        lr_1d: learning rate of the AdamW tensors, kept as the ratio lr_1d/lr in the group's `lr_1d_ratio`.
        betas_1d: their betas.
        weight_decay_1d: their weight decay; None means the group's own (the authors' code forces 0.1).
        clip_norm: largest 2-norm of each tensor's corrected gradient; None switches clipping off.
        first_step: `"paper"` starts with d_1 = 0, `"zero"` with g'_1 = 0 as the authors' code.
        max_grad_norm: clip the global norm of the gradients first, as `clip_grad_norm_` before the step would.
        skip_nonfinite: leave everything as it is when a gradient is not finite, and count it in
            `num_skipped_steps`; costs one wait for the device a step.
        preconditioner: override the type's choice: `"adamw"`, `"lion"`, `"polar"` or a registered name.
        update_scale: override the type's choice: `"none"`, `"spectral"`, `"rms"` or a registered name.
        polar_method, polar_coefficients, polar_steps, polar_dtype, polar_rank: see `polar_factor`; `polar_steps` may
            be a schedule, called with the number of steps already taken.
        matrix_view: which matrices a tensor holds: `"flatten"`, `"stack"` or `("split", dim, sizes)`.
        matrix_transposed: the matrices are stored as (in, out); matters to `"spectral"` only.
        maximize: ascend.
        foreach: True or False chooses the backend over lists of tensors or the one tensor by tensor; None chooses.
        fused: True insists on fused kernels, False does without; None takes them where they can run.
        capturable: keep the step count on the device, for CUDA graphs.
        differentiable: let autograd record the step.
        state_precision: how moments and previous gradient are stored: `"fp32"` (as precise as the arithmetic),
            `"bf16"` or `"8bit"`, or a dict of these for `exp_avg`, `exp_avg_sq` and `prev_grad`.
        exchange_precision: how matrices travel between ranks that hold pieces or copies of them: `"fp32"` (as precise
            as the arithmetic), `"bf16"` (2 bytes an element there, 2 back) or `"8bit"` (10 bits there and 6 back, of
            each piece's largest element; it costs little more than bf16, see docs/sharding.md); None: bf16 where the
            polar factor is computed in it, otherwise fp32.
        param_rounding: how half-precision parameters are rounded, and what is kept of the rest: `"nearest"`,
            `"stochastic"`, `"kahan"`, `"remainder8"` or `"remainder16"`.
        donate_grads: True: the step keeps `p.grad`'s memory as the previous gradient and leaves `p.grad = None`, which
            is safe where every step has new gradients; False: it copies; None: it keeps them where that is proved safe.
        offload_state: keep state in the host's memory and bring it to the device for the step.
        process_group: the ranks that hold the same plain parameters, as DistributedDataParallel's; they share out
            the matrices to orthogonalise. DTensors, as of `fully_shard`, need no group: they bring their mesh.
        shard_state: each rank of `process_group` keeps the state of a share of the parameters alone, takes their
            step and tells the others the result (ZeRO, stage 1).
        gather_matrices: every rank gathers and orthogonalises every matrix: slow, but needs no all-to-all.

    Raises:
        ValueError, TypeError, RuntimeError: a value out of range; the message says which and what would do.

    Reference: Yuan et al., "MARS: Unleashing the Power of Variance Reduction for Training Large Models"
    (arXiv:2411.10438); Liu et al., "MARS-M" (2025). Algorithm 4 prints neither clipping nor update scale; the
    authors' code has both, and so does this.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        gamma: Gamma = 0.025,
        is_approx: bool = True,
        mars_type: str = "adamw",
        optimize_1d: bool = False,
        lr_1d: float | None = None,
        betas_1d: tuple[float, float] = (0.9, 0.95),
        weight_decay_1d: float | None = None,
        *,
        clip_norm: float | None = 1.0,
        first_step: str = "paper",
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        preconditioner: str | None = None,
        update_scale: str | None = None,
        polar_method: str = "newton-schulz",
        polar_coefficients: str | Sequence[tuple[float, float, float]] | None = None,
        polar_steps: int | Callable[[int], int] | None = None,
        polar_dtype: torch.dtype | None = None,
        polar_rank: int | None = None,
        matrix_view: MatrixView = "flatten",
        matrix_transposed: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        state_precision: str | dict[str, str] = "fp32",
        exchange_precision: str | None = None,
        param_rounding: str = "nearest",
        donate_grads: bool | None = None,
        offload_state: bool = False,
        process_group: ProcessGroup | None = None,
        shard_state: bool = False,
        gather_matrices: bool = False,
    ) -> None:
        of_ranks = ("process_group", "shard_state", "gather_matrices")  # belong to the process, not to a checkpoint
        others = ("self", "params", "__class__", "of_ranks", *of_ranks)
        defaults = {name: value for name, value in locals().items() if name not in others}
        defaults |= {"schedule_step": 0, "num_skipped_steps": 0}
        check(dict(defaults))  # before the parameters, as torch.optim does
        self._previous: PreviousGradients | None = None
        self._inside_previous_params = False
        self._keeps_params = False
        self._steps = Steps(Replicas(process_group, shard_state=shard_state), gathers=gather_matrices)
        super().__init__(cast("Iterable[Tensor]", params), defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its hyperparameters default to the constructor's. Raises as the constructor does."""
        if isinstance(param_group, dict) and "lr_1d_ratio" in param_group:  # pyright: ignore[reportUnnecessaryIsInstance]
            param_group = {"lr_1d": None, **param_group}
        for key in param_group:
            near = get_close_matches(key, self.defaults, n=1, cutoff=0.8)
            if near and key not in (*self.defaults, "lr_1d_ratio"):
                raise ValueError(f"unknown hyperparameter {key!r} in a parameter group; did you mean {near[0]!r}?")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check(group)
            check_matrices(group, names_of(group))
            join(group, names_of(group), self._steps.replicas)
            backends.select(group)  # an explicit choice that cannot run says so now
        except Exception:
            self.param_groups.pop()
            raise

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a grad scaler may leave unscaling, and skipping, to the step: then nobody waits for the device."""
        return all(group["capturable"] and backends.select(group).unscales for group in self.param_groups)

    @property
    def num_skipped_steps(self) -> int:
        """Steps that `skip_nonfinite` or a grad scaler's overflow at the previous weights has skipped."""
        return self.param_groups[0]["num_skipped_steps"]

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...
    def step(self, closure: Callable[[], Loss] | None = None) -> Loss | None:
        """Take one step.

        Args:
            closure: zeroes the gradients, evaluates the loss, calls backward and returns the loss. Exact mode calls
                it at the previous weights first, then at the current ones, with the same randomness.

        Returns:
            The loss at the current weights, if a closure was given.

        Raises:
            ValueError: exact mode without closure or `previous_params()`.
            RuntimeError: a sparse gradient.
        """
        if self._inside_previous_params:
            raise RuntimeError("step() was called inside previous_params(); call it after the block")
        loss = self._evaluate(closure)
        with torch.set_grad_enabled(any(group["differentiable"] for group in self.param_groups)):
            previous, self._previous = self._previous, None
            if self._must_skip(previous):
                return loss
            groups = self.param_groups
            members = [self._steps.members(groups, self.state, i, previous) for i in range(len(groups))]
            self._keep_params()
            self._steps.take(groups, members, self._scaling)
            for group, of_group in zip(self.param_groups, members, strict=True):
                group["schedule_step"] += 1 if of_group else 0
        return loss

    @property
    def _scaling(self) -> LossScaling | None:
        """What a grad scaler that leaves unscaling to us has set."""
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        return None if found_inf is None else LossScaling(getattr(self, "grad_scale", None), found_inf)

    @contextmanager
    def step_in_backward(self) -> Generator[None, None, None]:
        """Inside the block each parameter takes its step as soon as backward has its gradient, which is then freed.

        No more than a few gradients exist at a time. When gradients are accumulated, the block holds the last
        backward only:

            with optimizer.step_in_backward():
                loss.backward()

        The block is the step; `step()` has nothing left to do. Approx mode with the clip of each tensor alone: what
        looks at all gradients together, or at two evaluations, cannot be had one parameter at a time.

        Raises:
            RuntimeError: exact mode, `max_grad_norm`, `skip_nonfinite` or `differentiable` in any group.
        """
        stepped: set[int] = set()
        try:
            with self._steps.in_backward(self.param_groups, self.state, self._scaling) as stepped:
                yield
        finally:
            for which in stepped:
                self.param_groups[which]["schedule_step"] += 1

    @contextmanager
    def previous_params(self, grad_scaler: torch.amp.GradScaler | None = None) -> Generator[None, None, None]:
        """Exact mode: evaluate the minibatch at the previous weights.

        Inside the block every parameter holds x_{t-1}; compute the loss and call backward, as often as the step
        accumulates. On leaving, the gradients are kept as g'_t, `p.grad` is None, the weights are x_t again and
        torch's random generators are put back, so that the evaluation at x_t draws the same dropout. Weights and
        generators come back also after an exception; then no gradient is kept. The block stands before the
        evaluation at x_t: gradients that are in `p.grad` on entering are dropped.

        Args:
            grad_scaler: the scaler whose `scale(loss)` was used inside the block, to divide the gradients by its
                scale. If they overflowed, the scale backs off at once, and the step is counted as skipped and will
                be if it is reached. Give each optimizer a scaler of its own then.

        Raises:
            RuntimeError: the optimizer is in approx mode, or the block is entered inside itself.
        """
        if all(group["is_approx"] for group in self.param_groups):
            raise RuntimeError("previous_params() is for exact mode; construct the optimizer with is_approx=False")
        if self._inside_previous_params:
            raise RuntimeError("previous_params() was entered inside itself; leave the first block before")
        self._previous = None
        self.zero_grad(set_to_none=True)
        self._inside_previous_params = True
        try:
            with evaluated_at_previous(self.param_groups, self.state, grad_scaler) as previous:
                yield
            self._previous = previous
            if previous.overflowed:
                self._count_skipped_step()
        finally:
            self._inside_previous_params = False
            self.zero_grad(set_to_none=True)

    def _evaluate(self, closure: Callable[[], Loss] | None) -> Loss | None:
        if closure is None:
            return None
        with torch.enable_grad():
            if any(not group["is_approx"] for group in self.param_groups):
                with self.previous_params():
                    closure()
            try:
                return closure()
            except BaseException:
                self._previous = None  # the step it was for will not happen
                raise

    def _must_skip(self, previous: PreviousGradients | None) -> bool:
        if previous is not None and previous.overflowed:
            return True
        if not any(group["skip_nonfinite"] for group in self.param_groups):
            return False
        if all_gradients_finite(self.param_groups, previous, self._steps.replicas):
            return False
        self._count_skipped_step()
        return True

    def _count_skipped_step(self) -> None:
        for group in self.param_groups:
            group["num_skipped_steps"] += 1

    def _keep_params(self) -> None:
        """Exact mode: x_t is the next step's x_{t-1}, also for parameters without correction or gradient."""
        is_exact = not all(group["is_approx"] for group in self.param_groups)
        if not is_exact and not self._keeps_params:
            return
        for group in self.param_groups:
            for p in group["params"]:
                if p in self.state:
                    (keep_params if is_exact else drop_params)(self.state[p], p)
        self._keeps_params = is_exact

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch.optim does, with schedules of gamma as plain dicts."""
        if self._inside_previous_params:
            raise RuntimeError("state_dict() was called inside previous_params(), where the weights are x_{t-1}")
        self._steps.synchronize()
        return to_plain(super().state_dict(), self.param_groups)

    def consolidated_state_dict(self, to: int = 0) -> dict[str, Any] | None:
        """Return the whole state under `shard_state` on rank `to` of the process group, None on the others.

        All ranks of the group call it together. Where every rank has the whole state it is `state_dict()`; so one
        line serves both: `state = optimizer.consolidated_state_dict()`, and rank 0 saves it.
        """
        packed = self.state_dict()
        state = self._steps.replicas.consolidated(packed["state"], to)
        return None if state is None else {**packed, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict; unlike torch.optim's own, fp32 state stays fp32 under half-precision parameters."""
        handle = self.register_load_state_dict_pre_hook(lambda optimizer, given: shield(given))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a loaded or unpickled state; hyperparameters that it lacks get the constructor's values."""
        old_groups: list[dict[str, Any]] = self.__dict__.get("param_groups", [])
        defaults = state.get("defaults", self.__dict__.get("defaults", {}))
        check_loaded(state["param_groups"], state["state"])
        super().__setstate__(state)
        self._previous = None
        self._inside_previous_params = False
        self._keeps_params = True  # perhaps: the state may hold previous parameters
        if "_steps" not in self.__dict__:  # a pickle knows no process group
            self._steps = Steps(Replicas(None, shard_state=False), gathers=False)
        self._steps.forget()
        for i, group in enumerate(self.param_groups):
            take_over(group, old_groups[i] if i < len(old_groups) else {}, defaults)
            restore_states(group, self.state, self._steps.replicas)
