"""The step by the native CPU kernels: one call a batch, everything read and written as stored."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from mars_optim.batch import Batch, Weight

from .native_library import RECORD, Arithmetic, Call, Flag, Format, Op, Rounding, load, run
from .operands import MOVES, Operands

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
    count, treatment = len(batch.params), batch.treatment
    operands, lr, no, keys = Operands(batch), float(treatment.lr), [0] * count, batch.keys
    columns: list[Iterable[float]] = [
        *operands.columns(op, out),
        no if keys is None else [int(key) for key in keys],
        *_weights(batch, op),
        [1 - lr * treatment.weight_decay] * count,
        _step_sizes(batch, op, lr, scales),
        [(1 - treatment.beta2 ** float(t)) ** -0.5 for t in batch.steps] if op == Op.ADAMW else no,
        [math.inf] * count if batch.grad_norms is None else _each(batch.grad_norms, count),
        _previous_norms(batch),
    ]
    records = bytearray(RECORD.size * count)
    for i, row in enumerate(zip(*columns, strict=True)):
        RECORD.pack_into(records, i * RECORD.size, *row)
    call = _call(batch, op, out)
    if call.clip_norm > 0 and batch.grad_norms is None:
        sums = torch.full((count, 3), math.inf, dtype=torch.float64)
    run(call, records, count, None if sums is None else sums.data_ptr())
    if call.clip_norm > 0:
        _keep_norms(batch, sums[:, 0].sqrt() if batch.grad_norms is None and sums is not None else batch.grad_norms)
    operands.write_back()
    # Autograd has to learn that the values it may have saved are gone.
    increment_version(batch.params if op in MOVES else out if op == Op.MOMENTUM and out else ())


# What storing a previous gradient may add to its norm: half a spacing of bf16, or of 8-bit codes at worst.
_NORM_GROWTH = {torch.bfloat16: 1.01, torch.float16: 1.01, torch.int8: 1.05}


def _previous_norms(batch: Batch) -> list[float]:
    if batch.prev_norms is None or batch.prev_grads is None:
        return [math.inf] * len(batch.params)
    growth = _NORM_GROWTH.get(batch.prev_grads[0].dtype, 1.0) if batch.prev_grads else 1.0
    return [growth * norm for norm in batch.prev_norms]


def _keep_norms(batch: Batch, norms: Tensor | None) -> None:
    """Leave the norms of the gradients that were kept for the next step's bound."""
    if norms is None or batch.norms is None or batch.indices is None:
        return
    for index, norm in zip(batch.indices, _each(norms, len(batch.params)), strict=True):
        batch.norms[index] = norm


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


def _weights(batch: Batch, op: Op) -> list[list[float]]:
    """The records' a, b, ratio, we and wg; clipping is in them unless the kernel finds it."""
    if op in (Op.PRODUCTS, Op.DESCEND):
        return [[0.0] * len(batch.params)] * 5
    clip: Weight = 1.0 if batch.clip is None else batch.clip
    average_weight, grad_weight = batch.momentum_weights
    weights = (batch.grad_weight * clip, batch.difference_weight * clip, batch.ratio, average_weight, grad_weight)
    return [_each(weight, len(batch.params)) for weight in weights]


def _each(weight: Weight, count: int) -> list[float]:
    if isinstance(weight, Tensor) and weight.ndim:
        return cast(list[float], weight.tolist())  # pyright: ignore[reportUnknownMemberType]
    return [float(weight)] * count


def _step_sizes(batch: Batch, op: Op, lr: float, scales: list[float] | None) -> list[float]:
    scales = [0.0] * len(batch.params) if scales is None else scales
    if op == Op.ADAMW:
        beta1 = batch.treatment.beta1
        return [lr * scale / (1 - beta1 ** float(t)) for scale, t in zip(scales, batch.steps, strict=True)]
    return [lr * scale for scale in scales]
