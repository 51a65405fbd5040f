"""Functions of whole matrices for tensors of which each rank has a piece, or which all ranks have.

Every matrix has one owner. Pieces of its momentum go to the owner by all-to-all, the owner computes, pieces of the
result come back by all-to-all, and replicas tell each other what they have. This happens in rounds, so
that one round's matrices travel while the one before is computed.
"""
# torch.distributed is not typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from .collectives import gathered
from .plan import Part, Pieces, Round, make_plan, sizes_of
from .spread import Box, Spread, intersection, size_of, within
from .wire import Wire

# From whole momenta, each with the number of its job, to directions of the same shapes.
Compute = Callable[[list[tuple[int, Tensor]]], list[Tensor]]


@dataclass(frozen=True)
class Job:
    """A tensor whose matrices are wanted whole."""

    index: int  # among all parameters: what the order on all ranks goes by
    momentum: Tensor  # this rank's piece
    direction: Tensor  # likewise; is written
    spread: Spread
    shape: tuple[int, ...]  # of the whole tensor
    parts: tuple[Box, ...]  # what is computed by itself
    works: tuple[float, ...]  # how much each part takes
    wires: tuple[Wire, Wire]  # how pieces travel to the owner and back


def exchange_(jobs: Sequence[Job], compute: Compute) -> None:
    """Write each job's piece of compute(whole momentum) to its `direction`; `compute` is called with this rank's share.

    What does not travel, as momenta that every rank has, is not coded.
    """
    together: dict[tuple[Any, ...], list[int]] = {}
    for i in sorted(range(len(jobs)), key=lambda i: jobs[i].index):
        job = jobs[i]
        key = (job.spread.shard_group, job.spread.replica_group, job.wires, job.momentum.device)
        together.setdefault(key, []).append(i)
    for numbers in together.values():
        members = [jobs[i] for i in numbers]

        def compute_some(blocks: list[tuple[int, Tensor]], numbers: list[int] = numbers) -> list[Tensor]:
            return compute([(numbers[i], block) for i, block in blocks])

        _Exchange(members).run(compute_some)


def gather_(jobs: Sequence[Job], compute: Compute) -> None:
    """Do the same by gathering every tensor on every rank: the oracle, and the way without all-to-all."""
    for number, job in sorted(enumerate(jobs), key=lambda pair: pair[1].index):
        boxes, everything = job.spread.cut(job.shape).boxes, tuple((0, n) for n in job.shape)
        mine, (there, back) = boxes[job.spread.shard], job.wires
        shares = [(part, intersection(part, mine)) for part in job.parts]
        momentum = job.momentum.to(there.dtype, copy=True)
        for _, shared in shares:
            if shared is not None and job.spread.shard_group is not None:
                held = within(shared, mine)
                momentum[held] = there.rounded(momentum[held])
        padded = momentum.new_zeros(max(size_of(box) for box in boxes))
        padded[: momentum.numel()] = momentum.reshape(-1)
        pieces = [padded]
        if job.spread.shard_group is not None:
            pieces = [torch.empty_like(padded) for _ in boxes]
            dist.all_gather(pieces, padded, group=job.spread.shard_group)
        whole = padded.new_empty(job.shape)
        for box, piece in zip(boxes, pieces, strict=True):
            whole[within(box, everything)] = piece[: size_of(box)].view(tuple(stop - start for start, stop in box))
        for part, shared in shares:
            (result,) = compute([(number, whole[within(part, everything)])])
            if shared is not None:
                job.direction[within(shared, mine)] = back.rounded(result[within(shared, part)]).to(job.direction.dtype)


@dataclass
class _UnderWay:
    """A collective, what it reads and what it writes."""

    handle: Any
    sent: Tensor
    received: Tensor

    def wait(self) -> Tensor:
        if self.handle is not None:
            self.handle.wait()
        return self.received


class _Exchange:
    """Jobs that share groups, wires and device."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs
        spread = jobs[0].spread
        self.shard_group, self.replica_group = spread.shard_group, spread.replica_group
        self.device = jobs[0].momentum.device
        self.there, self.back = jobs[0].wires
        if self.shard_group is None:
            self.there = Wire(self.there.dtype)
        parts = tuple(
            Part(i, box, work) for i, job in enumerate(jobs) for box, work in zip(job.parts, job.works, strict=True)
        )
        cuts = tuple(job.spread.cut(job.shape) for job in jobs)
        self.rounds = make_plan(parts, cuts, spread.num_replicas, (spread.replica, spread.shard))

    def run(self, compute: Compute) -> None:
        arriving = self._send(self.rounds[0])
        returning: tuple[Round, _UnderWay] | None = None
        for i, current in enumerate(self.rounds):
            blocks = self._blocks(current, arriving.wait())
            if i + 1 < len(self.rounds):
                arriving = self._send(self.rounds[i + 1])
            results = compute([(part.job, block) for part, block in zip(current.mine, blocks, strict=True)])
            if returning is not None:
                self._finish(*returning)
            returning = current, self._send_back(current, results)
        if returning is not None:
            self._finish(*returning)

    def _send(self, current: Round) -> _UnderWay:
        pieces = [
            self.jobs[piece.job].momentum[piece.held].reshape(-1) for to_one in current.outgoing for piece in to_one
        ]
        return self._all_to_all(self.there, pieces, current.outgoing, current.incoming)

    def _blocks(self, current: Round, received: Tensor) -> list[Tensor]:
        """Return whole momenta of the parts that are mine."""
        blocks = [
            torch.empty(tuple(stop - start for start, stop in part.box), dtype=self.there.dtype, device=self.device)
            for part in current.mine
        ]
        pieces = [piece for from_one in current.incoming for piece in from_one]
        for piece, values in zip(pieces, self.there.decode(received, sizes_of(pieces)), strict=True):
            blocks[piece.part][piece.block] = values.view(piece.shape)
        return blocks

    def _send_back(self, current: Round, results: Sequence[Tensor]) -> _UnderWay:
        pieces = [results[piece.part][piece.block].reshape(-1) for to_one in current.incoming for piece in to_one]
        return self._all_to_all(self.back, pieces, current.incoming, current.outgoing)

    def _all_to_all(
        self, wire: Wire, values: Sequence[Tensor], outgoing: Sequence[Pieces], incoming: Sequence[Pieces]
    ) -> _UnderWay:
        buffer = wire.encode(values, self.device)
        if self.shard_group is None:
            return _UnderWay(None, buffer, buffer)
        sent, received = ([wire.length(sizes_of(pieces)) for pieces in way] for way in (outgoing, incoming))
        target = buffer.new_empty(sum(received))
        handle = dist.all_to_all_single(target, buffer, received, sent, group=self.shard_group, async_op=True)
        return _UnderWay(handle, buffer, target)

    def _finish(self, current: Round, returning: _UnderWay) -> None:
        """Place what came back, here and on the other replicas."""
        returned = returning.wait()
        if self.replica_group is None:
            self._place(current.results[0], returned)
            return
        told = gathered(
            returned, [self.back.length(sizes_of(pieces)) for pieces in current.results], self.replica_group
        )
        for pieces, buffer in zip(current.results, told, strict=True):
            self._place(pieces, buffer)

    def _place(self, pieces: Pieces, buffer: Tensor) -> None:
        for piece, flat in zip(pieces, self.back.decode(buffer, sizes_of(pieces)), strict=True):
            direction = self.jobs[piece.job].direction
            direction[piece.held] = flat.view(piece.shape).to(direction.dtype)
