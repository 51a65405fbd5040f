"""The step by the native CPU kernels: one call a batch, everything read and written as stored."""

from __future__ import annotations

import math
from array import array
from typing import cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from mars_optim.batch import Batch, Weight

from .native_library import Arithmetic, Call, Flag, Format, Op, Rounding, load, pack, run
from .operands import AVERAGES, MOVES, Operands

reads_storage = True
unscales = False
measures_clip = True
bounds_clip = True

_FORMATS = {
    torch.float32: Format.F32,
    torch.float64: Format.F64,
    torch.bfloat16: Format.BF16,
    torch.float16: Format.F16,
    torch.int8: Format.Q8,
    torch.uint8: Format.Q8,
}
_SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq")


def require() -> None:
    """Raise NativeUnavailable, which says why, where the kernels cannot run."""
    load()


def gradient_products(batch: Batch) -> Tensor:
    """Return (g.g, g.g', g'.g') for each tensor in float64, shape (n, 3)."""
    sums = torch.zeros(len(batch.params), 3, dtype=torch.float64)
    _run(batch, Op.PRODUCTS, sums=sums)
    return sums


def momentum_(batch: Batch) -> list[Tensor]:
    """m_t = beta1 m_{t-1} + (1-beta1) c~_t, and v_t if there is one; return m_t."""
    averages = batch.state[batch.momentum_name]
    assert not any(name in batch.state for name in _SECOND_MOMENTS)
    if not batch.treatment.one_buffer and averages[0].dtype == _arithmetic(batch):
        _run(batch, Op.MOMENTUM)
        return averages
    momenta = [torch.empty_like(m, dtype=_arithmetic(batch)) for m in averages]
    _run(batch, Op.MOMENTUM, out=momenta)
    return momenta


def descend_(batch: Batch, directions: list[Tensor], scales: list[float]) -> None:
    """x_{t+1} = x_t - lr (scale * direction + weight_decay * x_t)."""
    _run(batch, Op.DESCEND, out=directions, scales=scales)


def adamw_(batch: Batch) -> None:
    """m^_t / (sqrt(v^_t) + eps), both moments bias corrected."""
    _run(batch, Op.ADAMW, scales=batch.update_scales)


def lion_(batch: Batch) -> None:
    """sign(m_t)."""
    _run(batch, Op.LION, scales=batch.update_scales)


def _run(
    batch: Batch,
    op: Op,
    *,
    out: list[Tensor] | None = None,
    scales: list[float] | None = None,
    sums: Tensor | None = None,
) -> None:
    count, operands = len(batch.params), Operands(batch)
    keys = [int(key) for key in batch.keys or [0] * count]
    records = pack([*operands.columns(op, out), array("Q", keys), *_numbers(batch, op, scales)])
    call = _call(batch, op, out)
    if call.clip_norm > 0 and batch.grad_norms is None:
        sums = torch.full((count, 3), math.inf, dtype=torch.float64)
    has_begun = bytearray(1)
    try:
        run(call, records, count, None if sums is None else sums.data_ptr(), has_begun)
    finally:  # also when a signal's exception was waiting for the kernels to be done
        if has_begun[0] and op in AVERAGES and batch.moves_prev_grads and batch.next_grads is not None:
            for state, grad in zip(batch.owners, batch.next_grads, strict=True):
                state["prev_grad"] = grad
    if call.clip_norm > 0:
        _keep_norms(batch, sums[:, 0].sqrt() if batch.grad_norms is None and sums is not None else batch.grad_norms)
    operands.write_back()
    # Autograd has to learn that the values it may have saved are gone.
    increment_version(batch.params if op in MOVES else out if op == Op.MOMENTUM and out else ())


def _numbers(batch: Batch, op: Op, scales: list[float] | None) -> list[array[float]]:
    """The records' numbers: a, b, ratio, we, wg, decay, step_size, inv_sqrt_bias2, g_norm, prev_norm."""
    count, treatment, lr = len(batch.params), batch.treatment, float(batch.treatment.lr)
    decay = 1 - lr * treatment.weight_decay
    if op in (Op.PRODUCTS, Op.DESCEND):
        step_sizes = 0.0 if scales is None else [lr * scale for scale in scales]
        columns = [0.0, 0.0, 0.0, 0.0, 0.0, decay, step_sizes, 0.0, math.inf, math.inf]
        return [_each(column, count) for column in columns]
    clip: Weight = 1.0 if batch.clip is None else batch.clip  # unless the kernel finds it
    biases, roots = _bias_corrections(batch) if op == Op.ADAMW else ([1.0] * count, 0.0)
    step_sizes = [lr * scale / bias for scale, bias in zip(scales or [0.0] * count, biases, strict=True)]
    norms = math.inf if batch.grad_norms is None else batch.grad_norms
    columns = [batch.grad_weight * clip, batch.difference_weight * clip, batch.ratio, *batch.momentum_weights]
    columns += [decay, step_sizes, roots, norms, _previous_norms(batch)]
    return [_each(column, count) for column in columns]


def _bias_corrections(batch: Batch) -> tuple[list[float], list[float]]:
    """1 - beta1^t and 1/sqrt(1 - beta2^t) for each tensor; mostly they have one t."""
    beta1, beta2, steps = batch.treatment.beta1, batch.treatment.beta2, [float(t) for t in batch.steps]
    pairs = {t: (1 - beta1**t, (1 - beta2**t) ** -0.5) for t in set(steps)}
    return [pairs[t][0] for t in steps], [pairs[t][1] for t in steps]


# What storing a previous gradient may add to its norm: half a spacing of bf16, or of 8-bit codes at worst.
_NORM_GROWTH = {torch.bfloat16: 1.01, torch.float16: 1.01, torch.int8: 1.05}


def _previous_norms(batch: Batch) -> float | list[float]:
    if batch.prev_norms is None or not batch.prev_grads:
        return math.inf
    growth = _NORM_GROWTH.get(batch.prev_grads[0].dtype, 1.0)
    return [growth * norm for norm in batch.prev_norms]


def _keep_norms(batch: Batch, norms: Tensor | None) -> None:
    """Leave the norms of the gradients that were kept for the next step's bound."""
    if norms is None or batch.norms is None or batch.indices is None:
        return
    batch.norms.update(zip(batch.indices, _each(norms, len(batch.params)), strict=True))


def _call(batch: Batch, op: Op, out: list[Tensor] | None) -> Call:
    treatment, state = batch.treatment, batch.state
    previous = batch.prev_grads if batch.prev_grads is not None else batch.next_grads
    flags = (
        (Flag.ONE_BUFFER if treatment.one_buffer else 0)
        | (Flag.AMSGRAD if treatment.amsgrad and op == Op.ADAMW else 0)
        | (0 if batch.salts is None else Flag.STOCHASTIC_M | Flag.STOCHASTIC_V)
    )
    clips = batch.clip is None and op in (Op.ADAMW, Op.LION, Op.MOMENTUM)
    return Call(
        op=op,
        arithmetic=Arithmetic.DOUBLE if _arithmetic(batch) == torch.float64 else Arithmetic.FLOAT,
        x_format=_FORMATS[batch.params[0].dtype],
        g_format=_FORMATS[batch.grads[0].dtype],
        prev_format=_FORMATS[(batch.grads if previous is None else previous)[0].dtype],
        m_format=_FORMATS[state[batch.momentum_name][0].dtype],
        v_format=_FORMATS[state["exp_avg_sq"][0].dtype] if "exp_avg_sq" in state else Format.F32,
        out_format=Format.F32 if out is None else _FORMATS[out[0].dtype],
        rounding=Rounding[treatment.param_rounding.upper()] if batch.params[0].itemsize == 2 else Rounding.NEAREST,
        flags=flags,
        num_threads=torch.get_num_threads(),
        beta1=treatment.beta1,
        beta2=treatment.beta2,
        eps=treatment.eps,
        clip_norm=(treatment.clip_norm or 0.0) if clips else 0.0,
    )


def _arithmetic(batch: Batch) -> torch.dtype:
    return torch.float64 if batch.params[0].dtype == torch.float64 else torch.float32


def _each(value: Weight | list[float], count: int) -> array[float]:
    """The column of a number, or of one for each tensor."""
    if isinstance(value, Tensor):
        value = cast("float | list[float]", value.tolist())  # pyright: ignore[reportUnknownMemberType]
    return array("d", value) if isinstance(value, list) else array("d", [value]) * count
