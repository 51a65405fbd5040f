"""`mars prepare`: which source, and where its tokens go."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mars_lab.data.tokenizer import gpt2_encoding
from mars_lab.errors import InputError
from mars_lab.prepare.files import JsonLines, PlainText, find_files
from mars_lab.prepare.hub import FINEWEB_EDU, OPENWEBTEXT, HubSource
from mars_lab.prepare.preparation import PrepareConfig, prepare
from mars_lab.prepare.source import Part, Source

_HUB = {"openwebtext": OPENWEBTEXT, "fineweb-edu": FINEWEB_EDU}


@dataclass(frozen=True)
class PrepareCommand:
    """Turn a corpus into files of GPT-2 tokens for `mars train --data.tokens FOLDER`; the same command continues."""

    source: tyro.conf.Positional[Literal["openwebtext", "fineweb-edu", "books", "text", "jsonl"]]
    """`openwebtext` and `fineweb-edu` stream from the Hugging Face Hub. `books`: a folder of JSON lines whose names
    begin with `train` and `val`. `text`: a text file or a folder of them. `jsonl`: JSON lines with a key `text`."""
    path: tyro.conf.Positional[Path | None] = None
    """The file or folder of `books`, `text` and `jsonl`."""
    output: Path | None = None
    """Folder of the token files; by default data/ and the name of the source."""
    config: Annotated[PrepareConfig, tyro.conf.arg(name="")] = field(default_factory=PrepareConfig)
    val_fraction: float = 0.01
    """Share of `text` and `jsonl` that is held out for validation; the others have a split of their own."""
    subset: str | None = None
    """Of fineweb-edu; by default sample-100BT."""
    revision: str | None = None
    """Commit of the repository on the Hub; by default the newest."""


def run(command: PrepareCommand) -> tuple[Path, dict[str, Any]]:
    """Prepare; the folder and its manifest.

    Raises:
        InputError: the command doesn't fit together, or see `prepare`.
    """
    encoding = gpt2_encoding()
    if command.source in _HUB:
        folder = command.output or Path("data") / command.source
        source: Source = _hub_source(command)
    else:
        path = _path(command)
        folder = command.output or Path("data") / path.resolve().stem
        source = _local_source(command, path)
    return folder, prepare(source, encoding, folder, command.config)


def _hub_source(command: PrepareCommand) -> Source:
    if command.path is not None:
        raise InputError(
            f"{command.source} is streamed and takes no path, got {command.path}; --output names the folder"
        )
    corpus = _HUB[command.source]
    if command.subset is not None and corpus.subset is None:
        raise InputError(f"{command.source} has no subsets, got --subset {command.subset}")
    if command.config.max_tokens is not None:
        corpus = replace(corpus, num_documents=None)  # which is checked at the end
    return HubSource(replace(corpus, subset=command.subset or corpus.subset), command.revision)


def _path(command: PrepareCommand) -> Path:
    if command.path is None:
        raise InputError(f"{command.source} needs the path of what to prepare: mars prepare {command.source} PATH")
    if not command.path.exists():
        raise InputError(f"there is nothing at {command.path}")
    if not 0 < command.val_fraction <= 0.5:
        raise InputError(f"--val-fraction must be in (0, 0.5], got {command.val_fraction}")
    return command.path


def _local_source(command: PrepareCommand, path: Path) -> Source:
    if command.source == "text":
        return PlainText("text", find_files(path, (".txt", ".md")), command.val_fraction)
    files = find_files(path, (".jsonl",))
    if command.source == "jsonl":
        return JsonLines("jsonl", files, every=round(1 / command.val_fraction))
    parts: list[tuple[Path, Part]] = []
    for file in files:
        part: Part | None = "train" if file.name.startswith("train") else "val" if file.name.startswith("val") else None
        if part is not None:
            parts.append((file, part))
        elif not file.name.startswith("test"):
            raise InputError(f"{file} begins with neither train, val nor test, so it belongs to no part; use jsonl")
    parts.sort(key=lambda pair: pair[1] == "train")  # so that --max-tokens leaves some of both parts
    return JsonLines("books", [file for file, _ in parts], parts=[part for _, part in parts])
