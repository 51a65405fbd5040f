"""The faults, each with what must be said about it and what must be done."""

import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mars_lab.tasks.language import LanguageTask
from mars_lab.training.config import RunConfig

STEP = 7
"""The step in which a fault strikes; checkpoints are due every 3 steps."""
TIMEOUT = 10.0
"""Seconds after which a process counts as hung."""


_NOTICED = 3.0
"""Seconds in which the launcher's end reaches its processes; the few steps that are left would not take so long."""


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong on one process while it reads the batch of step `STEP`."""

    what: str
    strike: Callable[[Path, RunConfig], None]
    says: str
    """What the person must be able to read, as a regular expression."""
    restarts_itself: bool
    """Whether the launcher starts the training again; otherwise `mars train --resume` does."""
    repair: Callable[[RunConfig], None] = lambda config: None
    """What the message asks a person to do before."""


def token_folder(config: RunConfig) -> Path:
    """The prepared tokens of a drill, which has a cache of its own."""
    return next(path for path in Path(config.language.data.cache).iterdir() if path.is_dir())


def _kill_worker(folder: Path, config: RunConfig) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_launcher(folder: Path, config: RunConfig) -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(_NOTICED)


def _preempt(folder: Path, config: RunConfig) -> None:
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(_NOTICED)


def _fill_disk(folder: Path, config: RunConfig) -> None:
    # No file may grow beyond this, as if the disk had so much left: the next checkpoint breaks off in its middle.
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))


def _hang(folder: Path, config: RunConfig) -> None:
    time.sleep(3600)


def _corrupt_tokens(folder: Path, config: RunConfig) -> None:
    path = token_folder(config) / "train.bin"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.kill(os.getpid(), signal.SIGKILL)  # what is open is read on; the new processes meet it


def _prepare_anew(config: RunConfig) -> None:
    folder = token_folder(config)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


FAULTS = {
    "kill-worker": Fault("kill -9 of a worker", _kill_worker, r"Started again, number 1", True),
    "kill-launcher": Fault("kill -9 of the launcher", _kill_launcher, r"launcher of this process is gone", False),
    "preempt": Fault("SIGTERM to the launcher", _preempt, r"Stopped\. Continue with: mars train --resume", False),
    "full-disk": Fault(
        "a full disk while saving",
        _fill_disk,
        r"could not be written to .*the one before is intact; [\d,]+ bytes are free there",
        True,
    ),
    "nan": Fault("a loss that is NaN", lambda folder, config: None, rf"the loss is nan at step {STEP}", True),
    "corrupt-tokens": Fault(
        "a flipped bit in a token file", _corrupt_tokens, r"train\.bin is not as it was written", False, _prepare_anew
    ),
    "hang": Fault(
        "a process that hangs",
        _hang,
        rf"rank 0 has waited .* in 'forward and backward of step {STEP}, which exchange weights or gradients', "
        r"in gloo:all_reduce number \d+ of default_pg, shapes \[\[\d+\]\]; "
        rf"least far came rank 1 in 'reading the batch of step {STEP}'",
        True,
    ),
}


class FaultyTask(LanguageTask):
    """Strikes once in the life of a run, on its second process."""

    def __init__(self, config: RunConfig, fault: str, folder: Path) -> None:
        super().__init__(config.language, config.train.seed)
        self._run_config, self._fault, self._folder = config, fault, folder
        self._mark = folder / ".fault"
        self._spoilt: Tensor | None = None

    def batch(self, first: int, count: int) -> Tensor:
        """The same sequences, and the fault: in the thread that reads ahead."""
        sequences = self._run_config.train.batch_size
        is_due = first // sequences == STEP - 1 and first % sequences > 0 and not self._mark.exists()
        if is_due:
            self._mark.touch()
            FAULTS[self._fault].strike(self._folder, self._run_config)
        batch = super().batch(first, count)
        if is_due and self._fault == "nan":
            self._spoilt = batch
        return batch

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """The loss, or NaN."""
        loss = super().loss(model, batch)
        is_spoilt = self._spoilt is not None and torch.equal(batch, self._spoilt)
        return loss * torch.nan if is_spoilt else loss
