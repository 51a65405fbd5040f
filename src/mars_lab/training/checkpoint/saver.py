"""Writing checkpoints while the training goes on."""

import io
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from mars_lab.errors import TrainingError
from mars_lab.ranks import Ranks
from mars_lab.training.checkpoint import dcp
from mars_lab.training.checkpoint import folder as folders
from mars_lab.training.checkpoint.contents import Contents

VALUES = "values.pt"


class Saver:
    """Saves checkpoints in `folder`, one at a time, in a thread of its own; keeps the newest `num_kept`.

    Each process writes and hashes its part. Processes talk over a group of their own, so that nothing gets between
    the collectives of the training. On leaving the context the save under way is finished.
    """

    def __init__(self, folder: Path, ranks: Ranks, *, num_kept: int) -> None:
        self._folder, self._ranks, self._num_kept = folder, ranks, num_kept
        self._group: dist.ProcessGroup | None = None
        if ranks.size > 1:
            group = dist.new_group(backend="gloo")
            assert isinstance(group, dist.ProcessGroup)
            self._group = group
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def has_failed(self) -> bool:
        """Whether `wait` will raise; never waits."""
        return self._error is not None

    def save(self, step: int, contents: Contents) -> None:
        """Copy `contents` and write them in the background; waits for the previous save first.

        Raises:
            TrainingError: the previous save failed.
        """
        self.wait()
        staged: dict[str, Any] = BlockingAsyncStager().stage(contents.tensors)  # pyright: ignore[reportArgumentType]
        buffer = io.BytesIO()
        torch.save(contents.values, buffer)
        self._thread = threading.Thread(target=self._run, args=(step, staged, buffer.getvalue()), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait until the checkpoint under way, if there is one, is safe.

        Raises:
            TrainingError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise TrainingError(
                f"the checkpoint could not be written to {self._folder}: {_cause(error)}; the one before is intact; "
                f"{shutil.disk_usage(self._folder.parent).free:,} bytes are free there. Make room, then continue with: "
                "mars train --resume"
            ) from error

    def _run(self, step: int, tensors: dict[str, Any], values: bytes) -> None:
        try:
            self._write(step, tensors, values)
        except BaseException as error:
            self._error = error

    def _write(self, step: int, tensors: dict[str, Any], values: bytes) -> None:
        partial = self._folder / f".step-{step:08}"
        self._together(lambda: folders.begin(self._folder, step) if self._ranks.is_first else None)
        dcp.save(tensors, partial, self._group)
        hashes: dict[str, str] = {}
        for part in self._together(lambda: self._finish_files(partial, values)):
            hashes |= part
        if self._ranks.is_first:
            folders.commit(partial, hashes, num_kept=self._num_kept)
        self._together(lambda: None)  # nobody goes on before it is safe

    def _finish_files(self, partial: Path, values: bytes) -> dict[str, str]:
        own = list(partial.glob(f"__{self._ranks.rank}_*.distcp"))
        if self._ranks.is_first:
            folders.write(partial / VALUES, values)
            own += [partial / VALUES, partial / ".metadata"]
        return folders.hashes_of(own)

    def _together(self, work: Callable[[], Any]) -> list[Any]:
        """The results of `work` on every process; raises on all if it raises on one."""
        try:
            result, error = work(), None
        except Exception as raised:
            result, error = None, raised
        results: list[Any] = [(result, error)]
        if self._group is not None:
            results = [None] * self._ranks.size
            dist.all_gather_object(results, (result, error), group=self._group)
        for rank, (_, raised) in enumerate(results):
            if raised is not None:
                raised.add_note(f"on rank {rank}")
                raise raised
        return [result for result, _ in results]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
        elif self._thread is not None:
            self._thread.join()


def _cause(error: BaseException) -> str:
    """The first line of what went wrong; DCP wraps the error of each process."""
    if isinstance(error, CheckpointException):
        rank, (inner, _) = min(error.failures.items())
        return f"{inner} (on rank {rank})"
    return str(error)
