"""The interface between a task and the training loop."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from mars_lab.ranks import Ranks


class Task(Protocol):
    """A model, its batches, its loss and its evaluation."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever the data does; a run is only resumed on the data it began with. It may have lines."""
        ...

    @property
    def unit(self) -> str:
        """What a training target is: a token, an image."""
        ...

    @property
    def tokens_per_sequence(self) -> int:
        """Training targets in one sequence of a batch (1 where a sequence is a single example)."""
        ...

    def build_model(self) -> nn.Module:
        """A freshly initialised model, drawn from torch's global generator."""
        ...

    def layers(self, model: nn.Module) -> Sequence[nn.Module]:
        """The parts of a model of this task that are gathered one at a time when it is sharded, in order of use."""
        ...

    def split_layers(self, model: nn.Module, mesh: DeviceMesh) -> None:
        """Split the matrices of a model of this task over the processes of `mesh` (tensor parallelism)."""
        ...

    def batch(self, first: int, count: int) -> Tensor:
        """Training sequences number `first` to `first + count - 1` since the start: a pure function."""
        ...

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Mean training loss over the targets of `batch`, a scalar."""
        ...

    def evaluate(self, model: nn.Module, ranks: Ranks) -> dict[str, float]:
        """Measures on held-out data, `val_loss` among them; leaves every random generator as it was.

        Called by all of `ranks`, which share the work and return the same.
        """
        ...

    def sample(self, model: nn.Module, device: str) -> str:
        """Something a person can look at to judge the model; leaves every random generator as it was."""
        ...


def changed_lines(before: str, now: str) -> str:
    """What differs between two fingerprints, the first few lines of it."""
    old, new = set(before.splitlines()), set(now.splitlines())
    lines = [f"was: {line}" for line in sorted(old - new)] + [f"is: {line}" for line in sorted(new - old)]
    return "; ".join(lines[:4]) + ("; ..." if len(lines) > 4 else "")
