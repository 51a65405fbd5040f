"""From a source to token files and their manifest, on all cores, continued wherever it was stopped."""

import fcntl
import json
import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mars_lab.errors import InputError
from mars_lab.prepare.progress import PrepareProgress
from mars_lab.prepare.source import Part, Piece, Source
from mars_lab.prepare.token_writer import TokenWriter

if TYPE_CHECKING:
    import tiktoken

_FORMAT = 1
_BATCH_CHARACTERS = 1 << 19
_SECONDS_BETWEEN_RECORDS = 20.0
"""What a kill can cost."""


@dataclass(frozen=True)
class PrepareConfig:
    """How a corpus becomes token files."""

    shard_tokens: int = 100_000_000
    """Tokens of a full file."""
    max_tokens: int | None = None
    """Stop after about so many tokens; None means all of the corpus."""
    num_workers: int = 0
    """Threads that encode; 0 means one a core."""

    def __post_init__(self) -> None:
        if not 1 <= self.shard_tokens < 2**31:
            raise InputError(f"--shard-tokens must be in [1, 2**31), which the header holds, got {self.shard_tokens}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InputError(f"--max-tokens must be at least 1, got {self.max_tokens}")
        if self.num_workers < 0:
            raise InputError(f"--num-workers must be at least 0, got {self.num_workers}")


@dataclass(frozen=True)
class _Batch:
    """Some pieces, encoded, and where the source stands behind them."""

    tokens: list[tuple[Part | None, bool, np.ndarray]]
    num_bytes: int
    position: dict[str, Any]


def prepare(source: Source, encoding: "tiktoken.Encoding", folder: Path, config: PrepareConfig) -> dict[str, Any]:
    """Write the tokens of `source` to `folder` and return the manifest; the same call again continues.

    Each document is followed by the end-of-text token. The manifest is written every 20 seconds and says how far the
    files count, so that a process that is killed at any moment loses no more than that.

    Raises:
        InputError: the source can't be read, or the folder holds something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        preparation = _Preparation(source, encoding, folder, config)
        if not preparation.manifest["complete"]:
            preparation.run()
        return preparation.manifest


class _Preparation:
    def __init__(self, source: Source, encoding: "tiktoken.Encoding", folder: Path, config: PrepareConfig) -> None:
        self.source, self.encoding, self.folder, self.config = source, encoding, folder, config
        self.path = folder / "manifest.json"
        settings = {"about": source.about, "shard_tokens": config.shard_tokens, "max_tokens": config.max_tokens}
        settings = json.loads(json.dumps({**settings, "tokenizer": encoding.name, "vocab_size": encoding.n_vocab}))
        self.manifest: dict[str, Any] = {
            "format": _FORMAT,
            "complete": False,
            **settings,
            "documents": {"train": 0, "val": 0},
            "text_bytes": 0,
            "tokens": {},
            "sha256": {},
            "open_tokens": {"train": 0, "val": 0},
            "position": None,
        }
        if self.path.exists():
            self.manifest = self._recorded(settings)
        elif strangers := [path.name for path in folder.glob("*.bin")]:
            raise InputError(f"{folder} holds {strangers[0]} and no manifest.json; choose another --output")

    def _recorded(self, settings: dict[str, Any]) -> dict[str, Any]:
        try:
            manifest = json.loads(self.path.read_text())
        except ValueError as error:
            raise InputError(f"{self.path} is damaged ({error}); delete the folder to begin anew") from None
        for name, value in settings.items():
            if manifest.get(name) != value:
                raise InputError(
                    f"{self.folder} was begun with another {name} ({manifest.get(name)!r}, now {value!r}); choose "
                    "another --output, or delete the folder to begin anew"
                )
        return manifest

    def run(self) -> None:
        """Do what is left to do."""
        writers = {part: self._writer(part) for part in ("train", "val")}
        recorded = time.monotonic()
        try:
            with PrepareProgress(self.source, self.manifest) as progress:
                for batch in self._encoded():
                    filled = [self._write(writers, *tokens) for tokens in batch.tokens]
                    self.manifest["text_bytes"] += batch.num_bytes
                    self.manifest["position"] = batch.position
                    if any(filled) or time.monotonic() - recorded > _SECONDS_BETWEEN_RECORDS:
                        self._record(writers)
                        recorded = time.monotonic()
                    progress.update(self._num_tokens(writers))
                    if self.config.max_tokens is not None and self._num_tokens(writers) >= self.config.max_tokens:
                        break
            self._record(writers)
            self._finish(writers)
        finally:
            for writer in writers.values():
                writer.abandon()

    def _writer(self, part: Part) -> TokenWriter:
        done = sum(f"_{part}_" in name for name in self.manifest["tokens"])
        return TokenWriter(
            self.folder,
            self.source.name,
            part,
            shard_tokens=self.config.shard_tokens,
            num_done=done,
            num_open=self.manifest["open_tokens"][part],
        )

    def _write(self, writers: dict[str, TokenWriter], part: Part | None, is_document: bool, tokens: np.ndarray) -> bool:
        """Append to the files of `part`; whether one became full."""
        portions = [(part, tokens)]
        if part is None:
            val = writers["val"]
            room = 0 if val.num_done else self.config.shard_tokens - val.num_open
            portions = [("val", tokens[:room]), ("train", tokens[room:])]
            part = "val" if room else "train"
        self.manifest["documents"][part] += is_document
        is_filled = False
        for name, portion in portions:
            filled = writers[name or ""].write(portion)
            self._enter(filled)
            is_filled |= bool(filled)
        return is_filled

    def _enter(self, files: dict[str, tuple[int, str]]) -> None:
        self.manifest["tokens"] |= {name: count for name, (count, _) in files.items()}
        self.manifest["sha256"] |= {name: digest for name, (_, digest) in files.items()}

    def _num_tokens(self, writers: dict[str, TokenWriter]) -> int:
        return sum(self.manifest["tokens"].values()) + sum(writer.num_open for writer in writers.values())

    def _record(self, writers: dict[str, TokenWriter]) -> None:
        for writer in writers.values():
            writer.flush()
        self.manifest["open_tokens"] = {part: writer.num_open for part, writer in writers.items()}
        partial = self.path.with_suffix(".json.partial")
        with partial.open("w") as stream:
            stream.write(json.dumps(self.manifest, indent=1) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(self.path)

    def _finish(self, writers: dict[str, TokenWriter]) -> None:
        for part, documents in self.manifest["documents"].items():
            if not writers[part].num_done and not writers[part].num_open:
                other = sum(self.manifest["documents"].values()) - documents
                raise InputError(
                    f"no text for the part {part!r}: all {other} documents went to the other; give more text, another "
                    "--val-fraction or a smaller --shard-tokens"
                )
        for writer in writers.values():
            self._enter(writer.close())
        self.manifest |= {"complete": True, "open_tokens": {"train": 0, "val": 0}, "position": None}
        partial = self.path.with_suffix(".json.partial")
        partial.write_text(json.dumps(self.manifest, indent=1) + "\n")
        partial.replace(self.path)

    def _encoded(self) -> Iterator[_Batch]:
        """Batches in order; a few a worker are under way at any time, which bounds the memory."""
        num_workers = self.config.num_workers or os.cpu_count() or 1
        pending: deque[Future[_Batch]] = deque()
        pool = ThreadPoolExecutor(num_workers, thread_name_prefix="encode")  # tiktoken works without Python's lock
        try:
            for pieces in self._batches():
                pending.append(pool.submit(self._encode, pieces, self.source.position()))
                if len(pending) > 2 * num_workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _batches(self) -> Iterator[list[Piece]]:
        pieces: list[Piece] = []
        size = 0
        for piece in self.source.pieces(self.manifest["position"]):
            pieces.append(piece)
            size += len(piece.text)
            if size >= _BATCH_CHARACTERS:
                yield pieces
                pieces, size = [], 0
        if pieces:
            yield pieces

    def _encode(self, pieces: list[Piece], position: dict[str, Any]) -> _Batch:
        end = np.array([self.encoding.eot_token], dtype="<u2")
        tokens = []
        for piece in pieces:
            ids = self.encoding.encode_to_numpy(piece.text, disallowed_special=()).astype("<u2")
            ids = np.concatenate([ids, end]) if piece.ends_document else ids
            tokens.append((piece.part, piece.ends_document, ids))
        return _Batch(tokens, sum(len(piece.text.encode()) for piece in pieces), position)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process is preparing {folder}; wait for it or stop it") from None
        yield
