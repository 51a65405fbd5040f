"""What kernels that know only addresses are given of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from mars_optim.batch import Batch
from mars_optim.ownership import read_only_address
from mars_optim.state import is_q8

from .native_library import Op

MOVES = (Op.ADAMW, Op.LION, Op.DESCEND)  # change the parameters
AVERAGES = (Op.ADAMW, Op.LION, Op.MOMENTUM)  # change the moments, and keep g_t


class Operands:
    """A batch's tensors in the memory layout of their parameter.

    Those that have another layout get a copy; `write_back` brings what was written there home.
    """

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._layouts = [_dense_strides(p) for p in batch.params]
        self._copies: list[tuple[Tensor, Tensor]] = []

    def columns(self, op: Op, out: list[Tensor] | None) -> list[list[int]]:
        """The element counts and the addresses of an operation's operands, in the order of `RECORD`; 0: absent."""
        batch, absent = self._batch, [0] * len(self._batch.params)
        moves, averages, is_adamw, reads_gradient = op in MOVES, op in AVERAGES, op == Op.ADAMW, op != Op.DESCEND

        def entry(name: str, wanted: bool) -> list[int]:
            return self._addresses(batch.state[name], writes=True) if wanted and name in batch.state else absent

        def plain(name: str, wanted: bool) -> list[int]:
            return [t.data_ptr() for t in batch.state[name]] if wanted and name in batch.state else absent

        return [
            [p.numel() for p in batch.params],
            self._addresses(batch.params, writes=True) if moves else absent,
            entry("param_remainder", moves),
            self._addresses(batch.grads) if reads_gradient else absent,
            self._addresses(batch.prev_grads) if reads_gradient else absent,
            plain("prev_grad_scale", reads_gradient and batch.prev_grads is not None),
            self._addresses(batch.next_grads, writes=True) if averages else absent,
            plain("prev_grad_scale", averages and batch.next_grads is not None),
            entry(batch.momentum_name, averages),
            plain(f"{batch.momentum_name}_scale", averages),
            entry("exp_avg_sq", is_adamw),
            plain("exp_avg_sq_scale", is_adamw),
            entry("max_exp_avg_sq", is_adamw),
            plain("max_exp_avg_sq_scale", is_adamw),
            self._addresses(out, writes=op == Op.MOMENTUM),
        ]

    def write_back(self) -> None:
        """Call when the kernels have run, or are queued."""
        for tensor, copy in self._copies:
            if tensor is not copy:
                tensor.copy_(copy)

    def _addresses(self, tensors: list[Tensor] | None, *, writes: bool = False) -> list[int]:
        if tensors is None:
            return [0] * len(self._layouts)
        address = Tensor.data_ptr if writes else read_only_address
        return [address(self._laid_out(t, i, writes)) for i, t in enumerate(tensors)]

    def _laid_out(self, tensor: Tensor, i: int, writes: bool) -> Tensor:
        layout = self._layouts[i]
        if tensor.stride() == layout:
            return tensor
        assert not is_q8(tensor)
        copy = torch.empty_strided(tensor.shape, layout, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
        self._copies.append((tensor if writes else copy, copy))
        return copy


def _dense_strides(param: Tensor) -> tuple[int, ...]:
    """The strides of the state of a parameter: its own where it is dense."""
    return param.stride() if param.is_contiguous() else torch.empty_like(param).stride()
