"""Local sources: JSON lines and plain text, also compressed, of any size."""

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mars_lab.data.json_lines import text_of
from mars_lab.errors import InputError
from mars_lab.prepare.source import Part, Piece

_PIECE_BYTES = 1 << 18
_OPENERS: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}


def find_files(path: Path, suffixes: Sequence[str]) -> list[Path]:
    """`path` itself, or the files in it, subfolders included, whose names end in one of `suffixes`, packed or not.

    Raises:
        InputError: there is none.
    """
    if path.is_file():
        return [path]
    endings = tuple(suffix + packed for suffix in suffixes for packed in ("", *_OPENERS))
    found = sorted(file for file in path.rglob("*") if file.name.endswith(endings) and file.is_file())
    if not found:
        raise InputError(f"nothing to read at {path}: give a file, or a folder with files {', '.join(suffixes)}")
    return found


class _Files:
    """Files one after the other, and the byte (of the unpacked content) at which reading stands."""

    def __init__(self, name: str, paths: Sequence[Path]) -> None:
        self.name = name
        self.paths = list(paths)
        self._file, self._offset, self._documents = 0, 0, 0
        self._raw: IO[bytes] | None = None
        self._sizes = [path.stat().st_size for path in self.paths]

    def position(self) -> dict[str, Any]:
        """File, byte in it, and documents before."""
        return {"file": self._file, "offset": self._offset, "documents": self._documents}

    def progress(self) -> tuple[float, float | None]:
        """Bytes as they lie on the disk."""
        here = self._raw.tell() if self._raw is not None and not self._raw.closed else 0
        return sum(self._sizes[: self._file]) + here, sum(self._sizes)

    def _streams(self, position: dict[str, Any] | None) -> Iterator[tuple[Path, IO[bytes]]]:
        if position is not None:
            self._file, self._offset, self._documents = (position[key] for key in ("file", "offset", "documents"))
        while self._file < len(self.paths):
            path = self.paths[self._file]
            with path.open("rb") as self._raw:
                opener = _OPENERS.get(path.suffix)
                stream: IO[bytes] = self._raw if opener is None else opener(self._raw)
                with _unpacking(path):
                    stream.seek(self._offset)
                yield path, stream
            self._file, self._offset = self._file + 1, 0


class JsonLines(_Files):
    """One document a line, under the key `text`.

    Args:
        name: begins the names of the token files.
        paths: in reading order.
        every: one document in so many, the middle one, is held out.
        parts: of each file, instead of `every`.
    """

    def __init__(
        self, name: str, paths: Sequence[Path], *, every: int | None = None, parts: Sequence[Part] | None = None
    ) -> None:
        super().__init__(name, paths)
        self._every, self._parts = every, parts
        split = "by file name" if parts is not None else f"1 document in {every}"
        files = {str(path): size for path, size in zip(self.paths, self._sizes, strict=True)}
        self.about = {"source": "JSON lines", "files": files, "validation": split}

    def pieces(self, position: dict[str, Any] | None) -> Iterator[Piece]:
        """A document each."""
        for path, stream in self._streams(position):
            while line := _read_line(path, stream):
                start, self._offset = self._offset, stream.tell()
                if not line.strip():
                    continue
                text = text_of(line, f"{path}, line at byte {start}")
                if not text.strip():
                    continue
                part = self._part()
                self._documents += 1
                yield Piece(text, part)

    def _part(self) -> Part:
        if self._parts is not None:
            return self._parts[self._file]
        assert self._every is not None
        return "val" if self._documents % self._every == self._every // 2 else "train"


@contextmanager
def _unpacking(path: Path) -> Iterator[None]:
    try:
        yield
    except (lzma.LZMAError, zlib.error, OSError, EOFError) as error:  # OSError: of gzip and bz2
        raise InputError(f"{path} can't be unpacked ({error}); restore it") from None


def _read_line(path: Path, stream: IO[bytes]) -> bytes:
    with _unpacking(path):
        return stream.readline()


class PlainText(_Files):
    """One document a file, in pieces, so that a file may be larger than memory.

    A piece ends before white space that follows something else, where GPT-2's tokens end, too: the tokens are those
    of the whole file. (Only 256 KiB without any such place are cut anywhere.)

    Args:
        name: begins the names of the token files.
        paths: in reading order.
        val_fraction: with fewer than 1 / val_fraction files, this share of the text is held out, at the end;
            otherwise one file in so many, the middle one.
    """

    def __init__(self, name: str, paths: Sequence[Path], val_fraction: float) -> None:
        super().__init__(name, paths)
        if packed := [path for path in paths if path.suffix in _OPENERS]:
            raise InputError(
                f"{packed[0]} is packed; unpack it first: how much text it holds must be known for the split"
            )
        self._every = round(1 / val_fraction)
        self._cut: int | None = None
        if len(self.paths) < self._every:
            self._cut = self._first_safe_place(int(sum(self._sizes) * (1 - val_fraction)))
        split = f"1 file in {self._every}" if self._cut is None else f"the last {val_fraction:.2%} of the text"
        files = {str(path): size for path, size in zip(self.paths, self._sizes, strict=True)}
        self.about = {"source": "plain text", "files": files, "validation": split}

    def pieces(self, position: dict[str, Any] | None) -> Iterator[Piece]:
        """Stretches of at most 256 KiB."""
        for path, stream in self._streams(position):
            size, before = self._sizes[self._file], sum(self._sizes[: self._file])
            while self._offset < size:
                begin = before + self._offset
                end = size if self._cut is None or begin >= self._cut else min(size, self._cut - before)
                data = stream.read(min(_PIECE_BYTES, end - self._offset))
                if not data:
                    raise InputError(f"{path} ends at byte {self._offset} instead of {size}; it changed: begin anew")
                if self._offset + len(data) < end:
                    data = data[: _last_safe_place(data)]
                text = _decode(data, path, self._offset)
                self._offset += len(data)
                stream.seek(self._offset)
                self._documents += self._offset == end
                yield Piece(text, self._part(begin), ends_document=self._offset == end)

    def _first_safe_place(self, cut: int) -> int:
        """The first byte from `cut` on, counted over all files, where a piece may end."""
        index, before = 0, 0
        while before + self._sizes[index] < cut:
            before, index = before + self._sizes[index], index + 1
        with self.paths[index].open("rb") as stream:
            stream.seek(max(0, cut - before - 1))
            data = stream.read(_PIECE_BYTES)
        places = (end for end in range(1, len(data)) if _is_safe(data, end))
        characters = (end for end in range(1, len(data)) if data[end] & 0xC0 != 0x80)
        place = next(places, None) or next(characters, len(data))
        return max(cut - 1, before) + place

    def _part(self, begin: int) -> Part:
        if self._cut is not None:
            return "val" if begin >= self._cut else "train"
        return "val" if self._file % self._every == self._every // 2 else "train"


def _is_safe(data: bytes, end: int) -> bool:
    """Whether no token of GPT-2 reaches over `end`: white space begins there."""
    if data[end] not in b" \n\r\t":
        return False
    start = end - 1
    while start > 0 and data[start] & 0xC0 == 0x80:
        start -= 1
    return not data[start:end].decode(errors="replace").isspace()


def _last_safe_place(data: bytes) -> int:
    """Where to end a piece, or, if no place is safe, the last place between two characters."""
    safe = next((end for end in range(len(data) - 1, 0, -1) if _is_safe(data, end)), None)
    return safe or next((end for end in range(len(data) - 1, 0, -1) if data[end] & 0xC0 != 0x80), len(data))


def _decode(data: bytes, path: Path, offset: int) -> str:
    try:
        return data.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}, byte {offset + error.start}: 0x{data[error.start]:02x} is not UTF-8; convert the file first"
        ) from None
