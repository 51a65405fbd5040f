"""The step by Triton kernels on CUDA: a few launches a batch, everything read and written as stored, no host sync.

Launches, whatever the number of tensors:

    adamw_, lion_   prepare, update; with a clip of each tensor measured here also measure, before them
    momentum_       the same
    descend_        prepare, descend
    gradient_products   measure, add_products

Kernels find the tensors through a table of addresses. It is uploaded, from pinned memory and without waiting, when
addresses are not those of a table that was uploaded before. Numbers that are on the device are read there.
"""
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, reduce
from itertools import chain
from operator import or_
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from mars_optim.batch import Batch, Weight

from .native_library import Op, Rounding
from .operands import MOVES, Operands
from .triton_tables import block_map, leave_spare, table, upload

reads_storage = True
unscales = True
measures_clip = True
bounds_clip = False

_SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq")


class TritonUnavailable(RuntimeError):  # noqa: N818 - a state of the installation, not a mistake
    """The kernels cannot run here; the message names the cause and the remedy."""


def require() -> None:
    """Raise TritonUnavailable, which says why, where the kernels cannot run."""
    cause = _obstacle()
    if cause is not None:
        raise TritonUnavailable(cause)


@cache
def _obstacle() -> str | None:
    if not torch.cuda.is_available():
        return "the Triton kernels need a CUDA device and torch sees none; install a CUDA build of torch and a driver"
    try:
        from . import triton_kernels  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        return f"Triton cannot be imported ({error}); install the triton package that belongs to this torch"
    return None


def gradient_products(batch: Batch) -> Tensor:
    """Return (g.g, g.g', g'.g') for each tensor in float64, shape (n, 3)."""
    call = _Call(batch, Op.PRODUCTS)
    return call.products()


def momentum_(batch: Batch) -> list[Tensor]:
    """m_t = beta1 m_{t-1} + (1-beta1) c~_t; return m_t."""
    averages = batch.state[batch.momentum_name]
    assert not any(name in batch.state for name in _SECOND_MOMENTS)
    if not batch.treatment.one_buffer and averages[0].dtype == _arithmetic(batch):
        _Call(batch, Op.MOMENTUM).update()
        return averages
    # Where a step is skipped nobody writes these.
    empty = torch.empty_like if batch.scaling is None else torch.zeros_like
    momenta = [empty(m, dtype=_arithmetic(batch)) for m in averages]
    _Call(batch, Op.MOMENTUM, momenta).update()
    return momenta


def descend_(batch: Batch, directions: list[Tensor], scales: list[float]) -> None:
    """x_{t+1} = x_t - lr (scale * direction + weight_decay * x_t)."""
    _Call(batch, Op.DESCEND, directions, scales).update()


def adamw_(batch: Batch) -> None:
    """m^_t / (sqrt(v^_t) + eps), both moments bias corrected."""
    _Call(batch, Op.ADAMW, scales=batch.update_scales).update()


def lion_(batch: Batch) -> None:
    """sign(m_t)."""
    _Call(batch, Op.LION, scales=batch.update_scales).update()


class _Call:
    """One operation on a batch: its tables, and the launches."""

    def __init__(
        self, batch: Batch, op: Op, out: list[Tensor] | None = None, scales: list[float] | None = None
    ) -> None:
        from . import triton_kernels

        self.kernels = triton_kernels
        self.batch, self.op, self.out = batch, op, out
        self.device, self.count = batch.params[0].device, len(batch.params)
        self.operands = Operands(batch)
        columns = self.operands.columns(op, out)
        with _on(self.device):
            self.blocks, first = block_map(tuple(columns[0]), self.device)
            steps = [t.data_ptr() for t in batch.steps if isinstance(t, Tensor)] or [0] * self.count
            columns += [batch.salts or [0] * self.count, steps, first]
            words = b"".join(array("q", column).tobytes() for column in columns)
            self.table = table(words + array("d", scales or [0.0] * self.count).tobytes(), self.device)
            if steps[0]:
                leave_spare(self.table.nbytes, self.device)
        formats = triton_kernels.FORMATS
        previous = batch.prev_grads or batch.next_grads or batch.grads
        self.reads: dict[str, Any] = {
            "T": formats[_arithmetic(batch)],
            "G": formats[batch.grads[0].dtype],
            "PREV": formats[previous[0].dtype],
            "HAS_PREV": batch.prev_grads is not None,
            # All addresses at once: what is odd in one of them is odd here.
            "ALIGNED": reduce(or_, chain.from_iterable(columns[1:15]), 0) % 16 == 0,
        }

    def products(self) -> Tensor:
        """The sums of products of each tensor."""
        sums = torch.empty(self.count, 3, dtype=torch.float64, device=self.device)
        with _on(self.device):
            partial = self._measure(products=True)
            self._launch("add_products", self.count, self.table, partial, sums, self.count)
        return sums

    def update(self) -> None:
        """The step."""
        batch, treatment, kernels = self.batch, self.batch.treatment, self.kernels
        clips = batch.clip is None and self.op != Op.DESCEND
        records = torch.empty(self.count * len(kernels.NUMBERS), dtype=_arithmetic(batch), device=self.device)
        rounding = Rounding[treatment.param_rounding.upper()] if batch.params[0].itemsize == 2 else Rounding.NEAREST
        found_inf = None if batch.scaling is None else batch.scaling.found_inf.to(self.device, non_blocking=True)
        meta: dict[str, Any] = {
            "T": self.reads["T"],
            "ALIGNED": self.reads["ALIGNED"],
            "X": kernels.FORMATS[batch.params[0].dtype],
            "OUT": None if self.out is None else kernels.FORMATS[self.out[0].dtype],
            "ROUNDING": int(rounding),
            "SKIPS": found_inf is not None,
        }
        with _on(self.device):
            partial = self._measure(products=False) if clips else None
            self._prepare(partial, records)
            name = "descend"
            if self.op != Op.DESCEND:
                name = "update"
                meta |= self.reads | self._state_formats() | {"OP": int(self.op)}
            self._launch(name, len(self.blocks), self.blocks, self.table, records, found_inf, self.count, **meta)
        self.operands.write_back()
        # Autograd has to learn that the values it may have saved are gone.
        increment_version(batch.params if self.op in MOVES else self.out or ())

    def _state_formats(self) -> dict[str, Any]:
        batch, formats = self.batch, self.kernels.FORMATS
        second = batch.state.get("exp_avg_sq")
        return {
            "M": formats[batch.state[batch.momentum_name][0].dtype],
            "V": self.reads["T"] if second is None else formats[second[0].dtype],
            "KEEPS": batch.next_grads is not None,
            "ONE_BUFFER": batch.treatment.one_buffer,
            "AMSGRAD": batch.treatment.amsgrad and self.op == Op.ADAMW,
            "DRAWS": batch.salts is not None,
        }

    def _measure(self, *, products: bool) -> Tensor:
        batch = self.batch
        partial = torch.empty(len(self.blocks) * (3 if products else 1), dtype=torch.float64, device=self.device)
        weights = (0.0, 0.0, 0.0) if products else (batch.grad_weight, batch.difference_weight, batch.ratio)
        kinds, values = _numbers(weights, self.device)
        self._launch(
            "measure",
            len(self.blocks),
            *(self.blocks, self.table, partial, self.count, *values),
            KINDS=kinds,
            PRODUCTS=products,
            **self.reads,
        )
        return partial

    def _prepare(self, partial: Tensor | None, records: Tensor) -> None:
        batch, treatment = self.batch, self.batch.treatment
        steps = batch.steps
        on_device = isinstance(steps[0], Tensor)
        step: Weight = 0.0
        if not on_device:
            same = all(t == steps[0] for t in steps)
            step = steps[0] if same else upload(torch.tensor(steps, dtype=torch.float64), self.device)
        clip = 1.0 if batch.clip is None else batch.clip
        kinds, values = _numbers(
            (
                *(batch.grad_weight, batch.difference_weight, batch.ratio, clip, *batch.momentum_weights),
                *(treatment.lr, step, treatment.clip_norm or 0.0, treatment.weight_decay),
                *(treatment.beta1, treatment.beta2, treatment.eps),
            ),
            self.device,
        )
        self._launch(
            "prepare",
            self.count,
            *(self.table, partial, records, self.count, *values),
            KINDS=kinds,
            OP=int(self.op),
            CLIPS=partial is not None,
            STEP=self.kernels.FORMATS[steps[0].dtype] if isinstance(steps[0], Tensor) else None,
        )

    def _launch(self, name: str, num_programs: int, *args: Any, **meta: Any) -> None:
        if num_programs:
            # Fused multiply-adds would round otherwise than the other backends do, and win nothing here.
            options = {"num_warps": self.kernels.NUM_WARPS, "enable_fp_fusion": False}
            getattr(self.kernels, name)[(num_programs,)](*args, **meta, **options)


def _arithmetic(batch: Batch) -> torch.dtype:
    return torch.float64 if batch.params[0].dtype == torch.float64 else torch.float32


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _numbers(weights: Sequence[Weight], device: torch.device) -> tuple[int, list[int | Tensor]]:
    """What `number` in the kernels reads: kinds of two bits each, and the bits of doubles or tensors on the device."""
    kinds = 0
    values: list[int | Tensor] = []
    for place, weight in enumerate(weights):
        if isinstance(weight, Tensor) and weight.device.type == "cpu" != device.type:
            weight = float(weight)  # the host's own: nobody waits
        if isinstance(weight, Tensor):
            kinds |= (2 if weight.ndim else 1) << 2 * place
            values.append(weight.to(device, non_blocking=True).contiguous())
        else:
            # Zero as -0.0: its bits are 64, and the type of an argument, hence what is compiled, stays the same.
            values.append(struct.unpack("=q", struct.pack("=d", weight or -0.0))[0])
    return kinds, values
