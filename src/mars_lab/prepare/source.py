"""What `mars prepare` reads: a stream of text that can be left and entered again anywhere."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Part = Literal["train", "val"]


@dataclass(frozen=True)
class Piece:
    """Some text, a whole document or a stretch of one."""

    text: str
    part: Part | None
    """Where it belongs; None means the first file of tokens, which is for validation, or the training part after it."""
    ends_document: bool = True


class Source(Protocol):
    """A corpus."""

    @property
    def name(self) -> str:
        """Begins the names of the token files."""
        ...

    @property
    def about(self) -> dict[str, Any]:
        """Entries of the manifest (source, revision, licence, ...); only with the same is a preparation continued."""
        ...

    def pieces(self, position: dict[str, Any] | None) -> Iterator[Piece]:
        """The text from `position` on, None being the start; always in the same order."""
        ...

    def position(self) -> dict[str, Any]:
        """Where the pieces handed out so far end; survives JSON."""
        ...

    def progress(self) -> tuple[float, float | None]:
        """How much has been read and how much there is, in a unit of the source's own; None is unknown."""
        ...
