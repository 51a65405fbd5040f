"""The processes that train one model together, as seen from one of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """A process among those that train together; without arguments a process that trains alone.

    The batch is divided into `num_shares`, of which it has number `share`. Processes that split the layers
    of the model among each other have the same share.
    """

    rank: int = 0
    size: int = 1
    share: int = 0
    num_shares: int = 1
    device: str = "cpu"

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def rows(self, count: int) -> slice:
        """Which of `count` rows are this process's, of an equal share for each."""
        each = count // self.num_shares
        return slice(self.share * each, (self.share + 1) * each)

    def weighted_rows(self, batch: Tensor) -> tuple[Tensor, int]:
        """The process's rows of `batch`, and how many of them count.

        Where there are fewer rows than shares, some processes get one that doesn't count: sharded models need all
        of them in every forward pass.
        """
        rows = batch[self.share :: self.num_shares]
        return (rows, len(rows)) if len(rows) else (batch[:1], 0)

    def sums(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all processes."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gathered(self, value: T) -> list[T]:
        """The `value` of every process, by rank; small objects only."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: T) -> T:
        """What the first process calls `value`; a small object."""
        if self.size == 1:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def copy_first_(self, tensors: Sequence[Tensor]) -> None:
        """Give `tensors` the values that they have in the first process."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def first_does(self, work: Callable[[], T]) -> T:
        """The result of `work`, which the first process alone does; what it raises is raised on all."""
        result, error = None, None
        if self.is_first:
            try:
                result = work()
            except Exception as raised:
                error = raised
        result, error = self.from_first((result, error))
        if error is not None:
            raise error
        return cast(T, result)
