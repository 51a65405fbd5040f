"""Token files of any size and number as one stream.

Two formats, both little-endian uint16 tokens: nanoGPT's, which is nothing else, and llm.c's and modded-nanogpt's,
with 256 int32 in front: the magic number 20240520, the version 1, the number of tokens, and zeros.

Files are read at a position (`pread`), not mapped: a file that is cut short under a map ends the process with a
bus error, and waiting for a page of a map holds Python's lock, so that reading ahead would not run beside the step.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from mars_lab.errors import InputError

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
_MAX_OPEN = 64


def header(num_tokens: int) -> bytes:
    """The 1024 bytes in front of `num_tokens` tokens."""
    words = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    words[:3] = MAGIC, VERSION, num_tokens
    return words.tobytes()


@dataclass(frozen=True)
class TokenFile:
    """Where the tokens of one file are."""

    path: Path
    begin: int
    """Bytes before the first token."""
    num_tokens: int

    @property
    def num_bytes(self) -> int:
        return self.begin + 2 * self.num_tokens

    @classmethod
    def inspect(cls, path: Path) -> "TokenFile":
        """Read the header of `path`, if it has one.

        Raises:
            InputError: its size doesn't fit its header, or the header is of another format.
        """
        size = path.stat().st_size
        with path.open("rb") as stream:
            start = stream.read(HEADER_BYTES)
        if not cls._has_header(start):
            if size % 2:
                raise InputError(f"{path} has {size} bytes, an odd number, so it was cut short; restore it")
            return cls(path, 0, size // 2)
        magic, version, num_tokens = (int(word) for word in np.frombuffer(start, "<i4", 3))
        if (magic, version) != (MAGIC, VERSION):
            raise InputError(
                f"{path} has a header with magic number {magic} and version {version}, not {MAGIC} and {VERSION}: it "
                "is damaged or holds no uint16 tokens; restore it, or write the tokens in this format"
            )
        file = cls(path, HEADER_BYTES, num_tokens)
        if file.num_bytes != size:
            raise InputError(
                f"{path} should have {file.num_bytes} bytes according to its header ({num_tokens} tokens), but has "
                f"{size}; it was cut short or changed: restore it"
            )
        return file

    @staticmethod
    def _has_header(start: bytes) -> bool:
        if len(start) < HEADER_BYTES:
            return False
        # The zeros tell a header whose first words are damaged from a file without one.
        return int(np.frombuffer(start, "<i4", 1)[0]) == MAGIC or not any(start[12:])

    def checksum(self) -> str:
        """Digest of the size and of the first and last kilobytes: what can be read of terabytes at every start."""
        digest = hashlib.sha256(str(self.num_bytes).encode())
        with self.path.open("rb") as stream:
            digest.update(stream.read(4096))
            stream.seek(max(0, self.num_bytes - 4096))
            digest.update(stream.read(4096))
        return digest.hexdigest()


class TokenFiles:
    """Files one after the other; a slice may begin in one and end in another.

    Args:
        files: in the order of the stream.
        vocab_size: a token that isn't below it is an error.
    """

    def __init__(self, files: Sequence[TokenFile], vocab_size: int) -> None:
        self.files = tuple(file for file in files if file.num_tokens)
        self.vocab_size = vocab_size
        self._ends = np.cumsum([file.num_tokens for file in self.files], dtype=np.int64)
        # Evicted ones are closed when nobody reads them any more, so that threads need no lock.
        self._open = lru_cache(maxsize=_MAX_OPEN)(_Descriptor)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, where: slice, /) -> np.ndarray:
        """The tokens of a slice without a step.

        Raises:
            InputError: a file was changed, or holds a token beyond the vocabulary.
        """
        start, stop, _ = where.indices(len(self))
        parts = [np.empty(0, "<u2")] if start >= stop else []
        index = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            file, end = self.files[index], int(self._ends[index])
            position = start - (end - file.num_tokens)
            parts.append(self._read(file, position, min(stop, end) - start))
            start, index = min(stop, end), index + 1
        return np.concatenate(parts) if len(parts) != 1 else parts[0]

    def _read(self, file: TokenFile, position: int, count: int) -> np.ndarray:
        descriptor = self._open(file)  # held: another thread may have it evicted while this one reads
        data = os.pread(descriptor.number, 2 * count, file.begin + 2 * position)
        if len(data) < 2 * count:
            raise InputError(
                f"{file.path} ends before token {position + count} of {file.num_tokens}: it was cut short while in "
                "use; restore it and continue with `mars train --resume`"
            )
        tokens = np.frombuffer(data, dtype="<u2")
        if tokens.max() >= self.vocab_size:
            where = int(tokens.argmax())
            raise InputError(
                f"{file.path} holds {tokens[where]} as token {position + where}, beyond the vocabulary of "
                f"{self.vocab_size}; the file is damaged or was made with another tokenizer: restore it"
            )
        return tokens


class _Descriptor:
    """An open file, closed with its last user."""

    number = -1

    def __init__(self, file: TokenFile) -> None:
        self.number = os.open(file.path, os.O_RDONLY)
        if (size := os.fstat(self.number).st_size) != file.num_bytes:
            raise InputError(
                f"{file.path} has {size} bytes and had {file.num_bytes} when it was first looked at; restore it"
            )

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)
