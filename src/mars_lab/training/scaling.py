"""Loss scaling, which training in float16 needs: its smallest number is 6e-8, its largest 65504.

The loss is multiplied by a scale before the backward pass, so that small gradients survive, and the gradients are
divided by it in fp32. A step whose gradients overflow all the same is skipped, and the scale is halved.

References: Micikevicius et al., 2018, arXiv:1710.03740.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mars_optim.sharding import local

_LOWEST = 1.0
"""A scale below this makes gradients smaller than they are, which no training needs that can go on in float16."""


class LossScaling:
    """The scale of a training's loss, and one verdict a step: all optimizers on all processes take it, or none does.

    `torch.amp.GradScaler` keeps the scale. It would judge each optimizer by itself and, of sharded gradients, on each
    process those that lie there. So the verdict is found here, and told to it as the gradient of a parameter.

    Not enabled it changes nothing, and every step is taken.
    """

    def __init__(self, parameters: Sequence[Tensor], *, enabled: bool) -> None:
        self._parameters = parameters
        self._verdict = torch.zeros((), device=parameters[0].device)
        self._teller = torch.optim.SGD([self._verdict])
        self._scaler = torch.amp.GradScaler(self._verdict.device.type, enabled=enabled)
        self.is_enabled = enabled
        self.has_overflowed = False
        """Whether the step at hand has to be skipped."""
        self.measures: dict[str, float] = {}
        """Of the last step, for its row of metrics."""
        if enabled:  # schedules count steps that are skipped, too
            warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler.step\(\)` before")

    @property
    def is_exhausted(self) -> bool:
        """Whether the gradients overflowed at every scale that makes sense."""
        return self._scaler.get_scale() < _LOWEST

    def scale(self, loss: Tensor) -> Tensor:
        """What to call `backward` of."""
        return self._scaler.scale(loss)

    @torch.no_grad()
    def unscale_(self, loss: float) -> None:
        """Divide the gradients by the scale, after each evaluation of a step; all processes call it together.

        Args:
            loss: unscaled; if it is not finite, the step will be skipped, whatever the gradients are.
        """
        if not self.is_enabled:
            return
        overflow = torch.full_like(self._verdict, float(not math.isfinite(loss)))
        gradients = [local(p.grad) for p in self._parameters if p.grad is not None]
        inverse = torch.full_like(self._verdict, 1 / self._scaler.get_scale())
        check_and_unscale_: Any = torch._amp_foreach_non_finite_check_and_unscale_  # pyright: ignore[reportPrivateImportUsage]
        check_and_unscale_(gradients, overflow, inverse)
        if dist.is_initialized():
            dist.all_reduce(overflow, dist.ReduceOp.MAX)
        self.has_overflowed |= bool(overflow)

    def finish_step(self) -> None:
        """Halve the scale after an overflow, or double it after many steps without one."""
        if not self.is_enabled:
            return
        self.measures = {"loss_scale": self._scaler.get_scale(), "skipped": float(self.has_overflowed)}
        self._verdict.grad = torch.full_like(self._verdict, math.inf if self.has_overflowed else 0.0)
        self._scaler.unscale_(self._teller)
        self._scaler.update()
        self.has_overflowed = False

    def state_dict(self) -> dict[str, Any]:
        """The state of a `torch.amp.GradScaler`; empty if not enabled."""
        return self._scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`; without effect if not enabled."""
        self._scaler.load_state_dict(state)
