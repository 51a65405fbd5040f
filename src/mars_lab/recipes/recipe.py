"""What a recipe is: a configuration, where it comes from, and what it should give."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from mars_lab.training.config import RunConfig


@dataclass(frozen=True)
class Recipe:
    """A named run. The configuration is made when it is asked for."""

    make: Callable[[], RunConfig]
    about: str
    """What it trains, and from which table or page its numbers are; the first line stands alone in lists."""
    published: Mapping[int, float] = field(default_factory=dict)
    """Validation loss by training tokens, where a paper gives one for just this run."""
    published_accuracy: float | None = None
    """Percent, of a classifier at the end."""
    hardware: str = "2 CPU cores, minutes"
    departures: tuple[str, ...] = ()
    """Where this follows the authors' code instead of their paper, or can't follow either."""

    @property
    def config(self) -> RunConfig:
        """The configuration, with every field."""
        return self.make()

    @property
    def summary(self) -> str:
        """The first line of `about`."""
        return self.about.splitlines()[0]
