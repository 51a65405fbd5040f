"""The folder of a checkpoint: `step-00000400`, with a manifest of the SHA-256 of every file.

It is written under another name, flushed to the disk and renamed, so that a crash at any moment leaves the previous
one in place.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

_MANIFEST = "manifest.json"


def begin(folder: Path, step: int) -> Path:
    """An empty folder to write the checkpoint of `step` into; what a crash has left is removed."""
    folder.mkdir(exist_ok=True)
    for leftover in folder.glob(".*"):
        shutil.rmtree(leftover)
    partial = folder / f".step-{step:08}"
    partial.mkdir()
    return partial


def commit(partial: Path, hashes: dict[str, str], *, num_kept: int) -> None:
    """Turn what `begin` has returned into a checkpoint, once all its files are flushed; keep the newest `num_kept`."""
    folder, final = partial.parent, partial.with_name(partial.name.removeprefix("."))
    write(partial / _MANIFEST, json.dumps({"sha256": hashes}, indent=2).encode())
    flush_folder(partial)
    for path in newest_first(folder):
        if path.name >= final.name:
            shutil.rmtree(path)  # A damaged one, or the resumed run would have begun after it.
    partial.rename(final)
    flush_folder(folder)
    for old in newest_first(folder)[num_kept:]:
        shutil.rmtree(old)


def newest_first(folder: Path) -> list[Path]:
    """All checkpoints, whether they are damaged or not."""
    return sorted(folder.glob("step-*"), reverse=True)


def problem(checkpoint: Path, share: int = 0, num_shares: int = 1) -> str | None:
    """What is wrong with a checkpoint, or None; of several processes each looks at its share of the files."""
    try:
        hashes: dict[str, str] = json.loads((checkpoint / _MANIFEST).read_text())["sha256"]
        for name in sorted(hashes)[share::num_shares]:
            if sha256(checkpoint / name) != hashes[name]:
                return f"the SHA-256 of {name} is not the one in its manifest"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hashes_of(paths: Sequence[Path]) -> dict[str, str]:
    """The SHA-256 of files of a checkpoint by their names."""
    return {path.name: sha256(path) for path in paths}


def write(path: Path, data: bytes | memoryview) -> None:
    """Write a file and flush it to the disk."""
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def flush_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
