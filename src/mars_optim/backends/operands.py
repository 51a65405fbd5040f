"""What kernels that know only addresses are given of a batch."""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from mars_optim.batch import Batch
from mars_optim.ownership import read_only_addresses
from mars_optim.state import is_q8

from .native_library import Op

MOVES = (Op.ADAMW, Op.LION, Op.DESCEND)  # change the parameters
AVERAGES = (Op.ADAMW, Op.LION, Op.MOMENTUM)  # change the moments, and keep g_t


class Operands:
    """A batch's tensors in the memory layout of their parameter.

    Those that have another layout get a copy; `write_back` brings what was written there home. Everything is looked
    up anew for each call, a column at a time: that takes a tenth of a microsecond a tensor, and nothing can be out of
    date.
    """

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._are_contiguous = _are_contiguous(batch.params)
        self._absent = array("Q", bytes(8 * len(batch.params)))
        self._copies: list[tuple[Tensor, Tensor]] = []

    def columns(self, op: Op, out: list[Tensor] | None) -> list[array[int]]:
        """The element counts and the addresses of an operation's operands, in the order of `RECORD`; 0: absent."""
        batch, absent = self._batch, self._absent
        moves, averages, is_adamw, reads_gradient = op in MOVES, op in AVERAGES, op == Op.ADAMW, op != Op.DESCEND

        def entry(name: str, wanted: bool) -> array[int]:
            return self._addresses(batch.state[name], writes=True) if wanted and name in batch.state else absent

        def plain(name: str, wanted: bool) -> array[int]:
            return _writable_addresses(batch.state[name]) if wanted and name in batch.state else absent

        return [
            array("Q", map(Tensor.numel, batch.params)),
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

    def _addresses(self, tensors: list[Tensor] | None, *, writes: bool = False) -> array[int]:
        if tensors is None:
            return self._absent
        if not (self._are_contiguous and _are_contiguous(tensors)):
            tensors = [self._laid_out(t, p, writes) for t, p in zip(tensors, self._batch.params, strict=True)]
        return _writable_addresses(tensors) if writes else read_only_addresses(tensors)

    def _laid_out(self, tensor: Tensor, param: Tensor, writes: bool) -> Tensor:
        # The strides of the state of a parameter are its own where it is dense.
        layout = param.stride() if param.is_contiguous() else torch.empty_like(param).stride()
        if tensor.stride() == layout:
            return tensor
        assert not is_q8(tensor)
        copy = torch.empty_strided(tensor.shape, layout, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
        self._copies.append((tensor if writes else copy, copy))
        return copy


def _are_contiguous(tensors: list[Tensor]) -> bool:
    return all(map(Tensor.is_contiguous, tensors))


def _writable_addresses(tensors: list[Tensor]) -> array[int]:
    return array("Q", map(Tensor.data_ptr, tensors))
