"""Checkpoints that exist whole or not at all.

A checkpoint is a folder `step-00000400` with `state.pt` and `manifest.json` (its SHA-256). It is written under
another name, flushed to the disk and renamed, so that a crash at any moment leaves the previous one in place.
"""

import hashlib
import io
import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mars_lab.errors import InputError


def save(folder: Path, step: int, state: dict[str, Any], *, num_kept: int) -> Path:
    """Write `state` as the checkpoint of `step`; keep the newest `num_kept`."""
    folder.mkdir(exist_ok=True)
    for leftover in folder.glob(".*"):
        shutil.rmtree(leftover)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest()
    partial, final = folder / f".step-{step:08}", folder / f"step-{step:08}"
    partial.mkdir()
    _write(partial / "state.pt", buffer.getbuffer())
    _write(partial / "manifest.json", json.dumps({"step": step, "sha256": digest}).encode())
    for path in _newest_first(folder):
        if path.name >= final.name:
            shutil.rmtree(path)  # A damaged one, or the resumed run would have begun after it.
    partial.rename(final)
    _flush_folder(folder)
    for old in _newest_first(folder)[num_kept:]:
        shutil.rmtree(old)
    return final


def load_newest(folder: Path, device: str) -> dict[str, Any] | None:
    """The newest undamaged state, tensors on `device`; None if there is no checkpoint yet.

    A damaged checkpoint is named on stderr and the one before it is used.

    Raises:
        InputError: there are checkpoints, and all of them are damaged.
    """
    candidates = _newest_first(folder)
    for path in candidates:
        try:
            data = (path / "state.pt").read_bytes()
            expected = json.loads((path / "manifest.json").read_text())["sha256"]
        except (OSError, ValueError, KeyError) as error:
            problem = str(error)
        else:
            if hashlib.sha256(data).hexdigest() == expected:
                return torch.load(io.BytesIO(data), map_location=device, weights_only=True)
            problem = "its SHA-256 is not the one in its manifest"
        print(f"The checkpoint {path} is damaged ({problem}); trying the one before.", file=sys.stderr)
    if candidates:
        raise InputError(f"every checkpoint in {folder} is damaged; start a new run, or restore them from a backup")
    return None


def newest(folder: Path) -> Path | None:
    """The newest checkpoint, whether it is damaged or not."""
    return next(iter(_newest_first(folder)), None)


def random_state() -> dict[str, Any]:
    """The states of torch's, Python's and NumPy's global generators, as plain values."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Undo `random_state`."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"]:
        torch.cuda.set_rng_state_all([value.cpu() for value in state["cuda"]])
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *rest))


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), reverse=True)


def _write(path: Path, data: bytes | memoryview) -> None:
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
