"""A corpus encoded once, by a tokenizer of its own, and kept on disk.

A prepared folder holds `train.bin` and `val.bin` (little-endian uint16 tokens and nothing else, the format of
nanoGPT), `tokenizer.json` and `manifest.json`. It appears whole or not at all: everything is written under
another name, flushed to the disk, and renamed at the end.
"""

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mars_lab.data.corpus import Corpus, split
from mars_lab.data.tokenizer import END_OF_TEXT
from mars_lab.errors import InputError

_FORMAT = 2
_TOKENIZER_CHARACTERS = 20_000_000
ALPHABET_SIZE = 257
"""The 256 bytes and END_OF_TEXT: no tokenizer has fewer entries."""


@dataclass(frozen=True)
class TextConfig:
    """How a corpus becomes tokens."""

    tokenizer_size: int
    val_fraction: float
    max_characters: int | None
    """Training text beyond this is left out."""

    def split(self, corpus: Corpus) -> Iterator[tuple[str, bool]]:
        """Pairs (text, held out)."""
        left = math.inf if self.max_characters is None else self.max_characters
        for text, held_out in split(corpus, self.val_fraction):
            if held_out:
                yield text, True
            elif left > 0:
                yield (text if len(text) <= left else text[: int(left)]), False
                left -= len(text)


def prepared(corpus: Corpus, cache: Path, config: TextConfig) -> Path:
    """The folder of `corpus` in `cache`, made first if this is the first time.

    Raises:
        InputError: the corpus can't be read, or a prepared file was changed after it was written.
    """
    settings = f"{_FORMAT} {corpus.fingerprint} {config.tokenizer_size} {config.val_fraction}"
    if config.max_characters is not None:
        settings += f" {config.max_characters}"
    folder = cache / f"{corpus.name}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}"
    if not folder.exists():
        _prepare(corpus, folder, config)
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, expected in manifest["sha256"].items():
        path = folder / name
        if not path.is_file() or _sha256(path) != expected:
            raise InputError(f"{path} is not as it was written; delete the folder {folder} to prepare it anew")
    return folder


def _prepare(corpus: Corpus, folder: Path, config: TextConfig) -> None:
    print(f"Preparing {corpus.name}: training a tokenizer, encoding the text (once; kept in {folder}) ...", flush=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    _remove_abandoned(folder)
    partial.mkdir(parents=True)
    try:
        tokenizer = _train_tokenizer(corpus, config)
        tokenizer.save(str(partial / "tokenizer.json"))
        counts = _encode(config.split(corpus), tokenizer, partial)
        hashes = {name: _sha256(partial / name) for name in ("train.bin", "val.bin", "tokenizer.json")}
        manifest = {"corpus": corpus.name, "fingerprint": corpus.fingerprint, "format": _FORMAT, "sha256": hashes}
        manifest |= {"tokenizer_size": tokenizer.get_vocab_size(), "val_fraction": config.val_fraction, **counts}
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        for path in (*partial.iterdir(), partial):
            _flush_to_disk(path)
        try:
            partial.rename(folder)
        except OSError:
            # Another process prepared the same folder in the meantime; its content is the same.
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """Delete what processes that were killed while preparing `folder` have left."""
    for path in folder.parent.glob(f".{folder.name}.*.partial"):
        try:
            os.kill(int(path.name.split(".")[-2]), 0)
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)


def _train_tokenizer(corpus: Corpus, config: TextConfig) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.tokenizer_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.encode_special_tokens = True  # END_OF_TEXT ends documents; in one it is text
    tokenizer.train_from_iterator(_first_characters(corpus, config), trainer)
    return tokenizer


def _first_characters(corpus: Corpus, config: TextConfig) -> Iterator[str]:
    """Training text, no more of it than a tokenizer needs: its time and memory grow with the text."""
    left = _TOKENIZER_CHARACTERS
    for text, held_out in config.split(corpus):
        if not held_out:
            yield text[:left]
            left -= len(text)
            if left <= 0:
                return


def _encode(documents: Iterator[tuple[str, bool]], tokenizer: Tokenizer, folder: Path) -> dict[str, dict[str, int]]:
    """Write the two token files; each document is followed by END_OF_TEXT."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    names = ("train.bin", "val.bin")
    counts: dict[str, dict[str, int]] = {what: dict.fromkeys(names, 0) for what in ("documents", "tokens")}
    num_characters, last_line = 0, time.monotonic()
    with (folder / names[0]).open("wb") as train, (folder / names[1]).open("wb") as val:
        for batch in _batched(documents, 64):
            num_characters += sum(len(text) for text, _ in batch)
            if time.monotonic() - last_line > 10:
                last_line = time.monotonic()
                print(f"  {num_characters / 1e6:,.0f} million characters", flush=True)
            encodings = tokenizer.encode_batch([text for text, _ in batch], add_special_tokens=False)
            for (_, held_out), encoding in zip(batch, encodings, strict=True):
                (val if held_out else train).write(np.array([*encoding.ids, end], dtype="<u2").tobytes())
                counts["documents"][names[held_out]] += 1
                counts["tokens"][names[held_out]] += len(encoding.ids) + 1
    return counts


def _batched(pairs: Iterator[tuple[str, bool]], size: int) -> Iterator[list[tuple[str, bool]]]:
    while batch := list(islice(pairs, size)):
        yield batch


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
