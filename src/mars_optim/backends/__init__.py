"""Backends: the arithmetic of a step over lists of tensors. The choice between them is made here."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from mars_optim.batch import Batch

from . import foreach, reference


class Backend(Protocol):
    """The functions every backend has, over the lists of a batch. None of them hands out c_t."""

    def gradient_products(self, batch: Batch) -> Tensor:
        """Return (g.g, g.o, o.o) for each tensor, shape (n, 3): sums, which shards of a tensor just add.

        o is g' under global clipping and g - g' otherwise; see `mars_optim.correction`.
        """
        ...

    def moments_(self, batch: Batch) -> None:
        """m <- beta1 m + (1-beta1) c~; likewise v of c~^2 where the batch has one; keep g_t where asked."""
        ...

    def descend_(self, batch: Batch, directions: list[Tensor], scales: list[float]) -> None:
        """x <- x - lr * (scale * direction + weight_decay * x)."""
        ...

    def adamw_(self, batch: Batch) -> None:
        """The whole step of `adamw`."""
        ...

    def lion_(self, batch: Batch) -> None:
        """The whole step of `lion`."""
        ...


def select(group: dict[str, Any]) -> Backend:
    """Return the backend of a parameter group, from torch.optim's own switches.

    By default lists of tensors go through `foreach` where torch has kernels for them. On the CPU it has not: there
    the lists' temporaries cost memory and no time is won.
    """
    wanted = group["foreach"]
    if wanted is None:
        wanted = all(p.device.type != "cpu" for p in group["params"])
    return foreach if wanted and not group["differentiable"] else reference
