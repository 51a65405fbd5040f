"""Token files while they grow."""

import hashlib
import os
from pathlib import Path

import numpy as np

from mars_lab.data.token_files import HEADER_BYTES, header
from mars_lab.errors import InputError
from mars_lab.prepare.source import Part


class TokenWriter:
    """The files of one part: `<name>_<part>_000000.bin`, ... with the header that says how many tokens follow.

    A file grows under another name and gets its own when it is full. What has been written is not safe before `flush`.

    Args:
        folder: gets the files.
        name: of the corpus.
        part: `train` or `val`.
        shard_tokens: tokens of a full file.
        num_done: files that are full.
        num_open: tokens of the one that isn't which are to be kept.
    """

    def __init__(
        self, folder: Path, name: str, part: Part, *, shard_tokens: int, num_done: int = 0, num_open: int = 0
    ) -> None:
        self._folder, self._prefix, self._shard_tokens = folder, f"{name}_{part}", shard_tokens
        self.num_done, self.num_open = num_done, num_open
        self._recover()
        self._stream = self._partial.open("r+b" if self._partial.exists() else "w+b")
        if self._stream.seek(0, os.SEEK_END) < HEADER_BYTES + 2 * num_open and num_open:
            self._stream.close()
            raise InputError(f"{self._partial} is shorter than it was; delete the folder {folder} to begin anew")
        self._stream.truncate(HEADER_BYTES + 2 * num_open)
        self._stream.seek(0)
        self._stream.write(header(0))
        self._stream.seek(0, os.SEEK_END)

    @property
    def _path(self) -> Path:
        return self._folder / f"{self._prefix}_{self.num_done:06}.bin"

    @property
    def _partial(self) -> Path:
        return self._path.with_suffix(".partial")

    def _recover(self) -> None:
        """Undo what happened after the last record: files that were finished, or begun, since."""
        if self._path.exists():
            self._path.replace(self._partial)
        for path in self._folder.glob(f"{self._prefix}_*"):
            if path.name.rpartition(".")[0] > self._path.stem:
                path.unlink()

    def write(self, tokens: np.ndarray) -> dict[str, tuple[int, str]]:
        """Append; the files this has filled, as name -> (tokens, SHA-256)."""
        filled: dict[str, tuple[int, str]] = {}
        while len(tokens):
            now, tokens = np.split(tokens, [self._shard_tokens - self.num_open])
            self._stream.write(now.astype("<u2").tobytes())
            self.num_open += len(now)
            if self.num_open == self._shard_tokens:
                filled |= self.close()
                self.num_done, self.num_open = self.num_done + 1, 0
                self._stream = self._partial.open("w+b")
                self._stream.write(header(0))
        return filled

    def flush(self) -> None:
        """Have what was written survive a power failure."""
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> dict[str, tuple[int, str]]:
        """Give the open file its header and its name, or remove it if it is empty."""
        if not self.num_open:
            self._stream.close()
            self._partial.unlink()
            return {}
        self._stream.seek(0)
        self._stream.write(header(self.num_open))
        self.flush()
        self._stream.seek(0)
        digest = hashlib.file_digest(self._stream, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]
        self._stream.close()
        self._partial.replace(self._path)
        return {self._path.name: (self.num_open, digest)}

    def abandon(self) -> None:
        """Close the file as it is; the next writer cuts it to what is on record."""
        self._stream.close()
