"""Tensors that are spread over ranks: what lies where, sums over shards, functions of whole matrices."""

from .exchange import Job, exchange_, gather_
from .replicas import Replicas
from .spread import (
    Box,
    Spread,
    groups_of,
    intersection,
    is_dtensor,
    like,
    local,
    piece_of,
    placed_like,
    refusal,
    spread_of,
    within,
)
from .sums import add_shards, any_rank

__all__ = [
    "Box",
    "Job",
    "Replicas",
    "Spread",
    "add_shards",
    "any_rank",
    "exchange_",
    "gather_",
    "groups_of",
    "intersection",
    "is_dtensor",
    "like",
    "local",
    "piece_of",
    "placed_like",
    "refusal",
    "spread_of",
    "within",
]
