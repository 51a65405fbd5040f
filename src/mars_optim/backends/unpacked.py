"""Batches in the arithmetic dtype, for backends that know no other format."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from mars_optim.batch import Batch
from mars_optim.state import (
    arithmetic_dtype,
    decode,
    decode_weight,
    encode_,
    encode_weight_,
    random_bits,
)


def unpack(batch: Batch) -> Batch:
    """Return `batch` with everything in the arithmetic dtype; tensors that are so already are shared."""
    dtype = arithmetic_dtype(batch.params[0])
    return replace(
        batch,
        packed=batch,
        params=[_weight(batch, i, p) for i, p in enumerate(batch.params)],
        grads=[g.to(dtype) for g in batch.grads],
        prev_grads=None
        if batch.prev_grads is None
        else [decode(g, _entry(batch, "prev_grad_scale", i), dtype) for i, g in enumerate(batch.prev_grads)],
        state={
            name: [decode(t, _entry(batch, f"{name}_scale", i), dtype) for i, t in enumerate(tensors)]
            for name, tensors in batch.state.items()
            if _is_values(name)
        },
        next_grads=None,
    )


def pack_(batch: Batch) -> None:
    """Store what a step has changed in an unpacked batch, and keep g_t where asked."""
    packed = batch.packed
    if packed is None:
        return
    keys = packed.keys
    for i in range(len(packed.params)):
        random = None if keys is None else random_bits(keys[i], packed.params[i])
        for name, values in batch.state.items():
            stored = packed.state[name][i]
            if stored is not values[i]:
                encode_(stored, _entry(packed, f"{name}_scale", i), values[i], _bits(name, random))
        if packed.params[i] is not batch.params[i]:
            rest = _entry(packed, "param_remainder", i)
            bits = None
            if keys is not None and packed.treatment.rounds_params_stochastically:
                bits = random_bits(keys[i] ^ 0x5BD1E995, packed.params[i]) >> 16
            encode_weight_(packed.params[i], rest, batch.params[i], bits)
        if packed.next_grads is not None:
            encode_(
                packed.next_grads[i], _entry(packed, "prev_grad_scale", i), packed.grads[i].to(batch.grads[i].dtype)
            )


def _weight(batch: Batch, i: int, param: Tensor) -> Tensor:
    return decode_weight(param, _entry(batch, "param_remainder", i)) if param.itemsize == 2 else param


def _entry(batch: Batch, name: str, i: int) -> Tensor | None:
    tensors = batch.state.get(name)
    return None if tensors is None else tensors[i]


def _is_values(name: str) -> bool:
    return not name.endswith("_scale") and name != "param_remainder"


def _bits(name: str, random: Tensor | None) -> Tensor | None:
    """Lower half of the random bits for the momentum, upper half for the second moment."""
    if random is None or name == "max_exp_avg_sq":
        return None
    return random >> 16 if name == "exp_avg_sq" else random & 0xFFFF
