"""The folder of a run: what is in it, who may write to it, and which one is the newest."""

import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mars_lab.errors import InputError
from mars_lab.training.config import RunConfig, from_dict


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Paths of a run; see `docs/training.md` for what they hold."""

    path: Path

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    def config(self) -> RunConfig:
        """The configuration the run was started with."""
        path = self.path / "config.json"
        try:
            return from_dict(RunConfig, json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise InputError(f"{path} is damaged ({error}); restore it, or start a new run") from None

    def summary(self) -> dict[str, Any] | None:
        """What the run came to, or None while it isn't finished."""
        path = self.path / "summary.json"
        return json.loads(path.read_text()) if path.exists() else None

    def write(self, name: str, text: str) -> None:
        """Write a file so that it exists whole or not at all, also after a power failure."""
        partial = self.path / f".{name}.partial"
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(self.path / name)

    @contextmanager
    def locked(self, patience: float = 0) -> Iterator[None]:
        """Keep other processes out; the lock goes when the process does, however it ends.

        `patience` is how many seconds to wait for it: a process whose launcher has died needs some to save and end.

        Raises:
            InputError: another process is writing to this folder.
        """
        deadline = time.monotonic() + patience
        with (self.path / ".lock").open("w") as stream:
            while True:
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        message = f"another process is training in {self.path}; wait for it or stop it"
                        raise InputError(message) from None
                    time.sleep(0.2)
            yield


def create(runs: Path, name: str, config: RunConfig, *, numbered: bool) -> RunFolder:
    """Make the folder of a new run: `name`, or, if `numbered`, `name-001` or the first number that is free.

    Raises:
        InputError: the folder is there already and isn't empty.
    """
    number = 1
    while True:
        path = runs / (f"{name}-{number:03}" if numbered else name)
        try:
            path.mkdir(parents=True)
            break
        except FileExistsError:
            if numbered:
                number += 1
                continue
        if not path.is_dir() or any(not entry.name.startswith(".") for entry in path.iterdir()):
            raise InputError(
                f"{path} holds another run or other files; choose another --name, or continue that run with "
                f"`mars train --resume {path}`"
            )
        break
    folder = RunFolder(path)
    folder.write("config.json", json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    return folder


def find(runs: Path, name: str | None) -> RunFolder:
    """The run at the path `name`, or called `name` in `runs`; None is the one that was started last.

    Raises:
        InputError: there is no such run.
    """
    started = sorted(runs.glob("*/config.json"), key=lambda path: path.stat().st_mtime_ns)
    if name is None:
        if not started:
            raise InputError(f"no run in {runs}{os.sep}; start one with `mars train`")
        return RunFolder(started[-1].parent)
    for path in (Path(name), runs / name):
        if (path / "config.json").is_file():
            return RunFolder(path)
    known = ", ".join(path.parent.name for path in reversed(started[-5:])) or "none"
    raise InputError(f"no run {name!r}: neither that folder nor {runs / name} has a config.json (newest: {known})")
