"""Tensors that are spread over ranks: what lies where, sums over shards, functions of whole matrices."""

from .assignment import assign
from .collectives import pads
from .exchange import Job, exchange_, gather_
from .plan import Part, make_plan, sizes_of
from .replicas import Replicas
from .spread import (
    Box,
    Cut,
    Spread,
    groups_of,
    has_dtensor,
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
from .wire import wires

__all__ = [
    "Box",
    "Cut",
    "Job",
    "Part",
    "Replicas",
    "Spread",
    "add_shards",
    "any_rank",
    "assign",
    "exchange_",
    "gather_",
    "groups_of",
    "has_dtensor",
    "intersection",
    "is_dtensor",
    "like",
    "local",
    "make_plan",
    "pads",
    "piece_of",
    "placed_like",
    "refusal",
    "sizes_of",
    "spread_of",
    "wires",
    "within",
]
