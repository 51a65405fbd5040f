"""Worker processes that take runs from a folder, any of which may be killed; both their ends.

`run` starts them and waits; `serve` is what such a process does.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mars_lab.errors import InputError, TrainingError, reported
from mars_lab.training.allocator import keep_freed_memory
from mars_lab.training.interruption import Interrupted, Interruption

_PATIENCE = 60
"""Seconds that workers have to save their runs."""
_SPEAKER = "mars worker"


def run(
    module: str,
    folder: Path,
    count: int,
    look: Callable[[], None],
    environments: Sequence[dict[str, str]] = (),
) -> None:
    """Have `count` processes `python -m MODULE FOLDER` do all that is to be done in `folder`.

    Args:
        module: its main function is `serve`.
        folder: also gets their logs.
        count: how many.
        look: called a few times a second, to report progress.
        environments: variables for each of them, beside this process's own.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the runs under way have been saved.
        InputError, TrainingError: a worker failed, with what it said.
    """
    with Interruption() as interruption, _started(module, folder, count, environments) as workers:
        while any(worker.poll() is None for worker in workers):
            if (number := interruption.signal_number) is not None:
                raise Interrupted("stopped, and saved the runs under way", number)
            _require_success(folder, workers)
            look()
            time.sleep(0.2)
        _require_success(folder, workers)


def serve(work: Callable[[Path, threading.Event], None]) -> None:
    """Call `work` with the folder that the command line names and an event that is set when it should end."""
    keep_freed_memory()
    stop = threading.Event()
    threading.Thread(target=_stop_without_parent, args=(stop,), daemon=True).start()
    with reported(_SPEAKER):
        try:
            work(Path(sys.argv[1]), stop)
        except Interrupted as interrupted:
            sys.exit(interrupted.exit_code)


@contextmanager
def _started(
    module: str, folder: Path, count: int, environments: Sequence[dict[str, str]]
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Worker processes; those that still run at the end are asked to save and stop."""
    if count < 1:
        raise InputError(f"--workers must be at least 1, got {count}")
    # More threads than cores make each other wait.
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    workers: list[subprocess.Popen[bytes]] = []
    try:
        for index in range(count):
            own = environments[index] if environments else {}
            with (folder / f"worker-{index}.log").open("wb") as log:
                workers.append(
                    subprocess.Popen(
                        [sys.executable, "-m", module, str(folder)],
                        stdin=subprocess.PIPE,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env={**os.environ, "OMP_NUM_THREADS": threads, **own},
                        process_group=0,  # Ctrl-C is for this process, which has the workers save
                    )
                )
        yield workers
    finally:
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.close()
        for worker in workers:
            try:
                worker.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()


def _require_success(folder: Path, workers: list[subprocess.Popen[bytes]]) -> None:
    for index, worker in enumerate(workers):
        if code := worker.poll():
            log = folder / f"worker-{index}.log"
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines() or ["it wrote nothing"]
            message = lines[-1].removeprefix(f"{_SPEAKER}: ")
            if code == 2:
                raise InputError(message)
            raise TrainingError(f"worker {index} ended with exit code {code} ({message}); all it wrote is in {log}")


def _stop_without_parent(stop: threading.Event) -> None:
    """End when the process that started this one closes its end of the pipe, or is gone.

    A signal alone would not do: one that comes with the last step of a run ends nothing.
    """
    os.read(sys.stdin.fileno(), 1)
    stop.set()
    os.kill(os.getpid(), signal.SIGTERM)
