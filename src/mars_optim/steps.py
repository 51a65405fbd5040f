"""The steps of an optimizer's groups, and what one step leaves for the next besides the state."""

from __future__ import annotations

from collections.abc import Generator, Iterable, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import backends
from .batch import Batch, LossScaling
from .batching import make_batches
from .exact import PreviousGradients
from .members import Completed, Member, members_of
from .offload import Lane
from .ranks import Ranks
from .sharding import Replicas, has_dtensor
from .spares import Spares
from .update import update_

Groups = Sequence[dict[str, Any]]


class Steps:
    """Takes the steps of parameter groups.

    What it remembers can be found again at any time: which states are complete, how long the previous gradients are,
    the lanes of offloaded state, and spare memory.

    Args:
        replicas: the ranks that hold the same plain parameters.
        gathers: whole matrices by gathering all on every rank.
    """

    def __init__(self, replicas: Replicas, *, gathers: bool) -> None:
        self.replicas = replicas
        self.norms: dict[int, float] = {}
        self._gathers = gathers
        self._completed = Completed()
        self._lanes: dict[torch.device, Lane] = {}
        self.spares = Spares()

    def forget(self) -> None:
        """Call when the state has been replaced."""
        self.norms, self._completed, self._lanes, self.spares = {}, Completed(), {}, Spares()

    def synchronize(self) -> None:
        """Wait until offloaded state is what the last step left."""
        for lane in self._lanes.values():
            lane.synchronize()

    def members(
        self,
        groups: Groups,
        states: MutableMapping[Tensor, dict[str, Any]],
        which: int,
        previous: PreviousGradients | None,
        places: Iterable[int] | None = None,
    ) -> list[Member]:
        """Return who takes part in a step of the group `which`; see `members_of`."""
        first_index = sum(len(group["params"]) for group in groups[:which])
        return members_of(groups[which], states, previous, self._completed, first_index, self.replicas, places)

    def take(self, groups: Groups, members: Sequence[list[Member]], scaling: LossScaling | None) -> None:
        """Algorithm 1 from the gradients on, for some members of each group."""
        told: list[Tensor] = []
        if self.replicas.shards_state:  # now: a donated gradient will be gone, on its owner alone
            told = [p for group in groups for p in group["params"] if p.grad is not None]
        resident: list[tuple[Batch, backends.Backend]] = []
        offloaded: list[tuple[Batch, backends.Backend]] = []
        for group, of_group in zip(groups, members, strict=True):
            if of_group:
                backend = backends.select(group)
                batches = [(batch, backend) for batch in make_batches(of_group, group, self.norms, scaling)]
                if group["offload_state"]:
                    offloaded += batches
                else:
                    resident += batches
        update_(resident, offloaded, self._lanes, self.spares, self._ranks(groups))
        self.spares.sweep()
        self.replicas.tell_(told)

    def _ranks(self, groups: Groups) -> Ranks:
        params = [p for group in groups for p in group["params"]]
        is_clipped = any(group["max_grad_norm"] is not None for group in groups)
        return Ranks(self.replicas, len(params), params[0].device, is_clipped, self._gathers)

    @contextmanager
    def in_backward(
        self, groups: Groups, states: MutableMapping[Tensor, dict[str, Any]], scaling: LossScaling | None
    ) -> Generator[set[int], None, None]:
        """Inside the block each parameter takes its step when backward has its gradient, which is then freed.

        Yields the groups whose parameters have taken one, to be read after the block.
        """
        self._check_in_backward(groups)
        places = {p: (i, j) for i, group in enumerate(groups) for j, p in enumerate(group["params"])}
        stepped: set[int] = set()

        @torch.no_grad()
        def step_one(p: Tensor) -> None:
            which, place = places[p]
            members: list[list[Member]] = [[] for _ in groups]
            members[which] = self.members(groups, states, which, None, [place])
            self.take(groups, members, scaling)
            p.grad = None
            stepped.add(which)

        handles = [p.register_post_accumulate_grad_hook(step_one) for p in places if p.requires_grad]
        try:
            yield stepped
        finally:
            for handle in handles:
                handle.remove()

    def _check_in_backward(self, groups: Groups) -> None:
        for name, forbidden in (("is_approx", False), *((n, True) for n in ("skip_nonfinite", "differentiable"))):
            if any(group[name] is forbidden for group in groups):
                raise RuntimeError(f"step_in_backward() with {name}={forbidden}: construct with {name}={not forbidden}")
        if any(group["max_grad_norm"] is not None for group in groups):
            raise RuntimeError("step_in_backward() sees one gradient at a time; construct with max_grad_norm=None")
        if self.replicas.group is not None or any(has_dtensor(group["params"]) for group in groups):
            raise RuntimeError("step_in_backward() takes steps before ranks have exchanged gradients; use step()")
