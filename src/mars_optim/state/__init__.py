"""How optimizer state and half-precision weights are stored, created and loaded."""

from .entries import (
    arithmetic_dtype,
    check_shapes,
    choose_form,
    complete,
    complete_remainder,
    complete_scalar,
    discard,
    drop_params,
    keep_params,
    portable,
    real,
    restore,
    shield,
)
from .formats import PRECISIONS, Key, decode, encode_, is_q8, key_of, precision_of, random_bits, salt
from .weights import ROUNDINGS, decode_weight, encode_weight_

__all__ = [
    "PRECISIONS",
    "ROUNDINGS",
    "Key",
    "arithmetic_dtype",
    "check_shapes",
    "choose_form",
    "complete",
    "complete_remainder",
    "complete_scalar",
    "decode",
    "decode_weight",
    "discard",
    "drop_params",
    "encode_",
    "encode_weight_",
    "is_q8",
    "keep_params",
    "key_of",
    "portable",
    "precision_of",
    "random_bits",
    "real",
    "restore",
    "salt",
    "shield",
]
