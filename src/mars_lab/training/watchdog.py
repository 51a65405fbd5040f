"""Noticing that a process hangs, and saying which one and where."""

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Self

import torch.distributed as dist
from torch._C._distributed_c10d import _dump_fr_trace_json  # pyright: ignore
from torch.distributed.distributed_c10d import PrefixStore

from mars_lab.ranks import Ranks

EXIT_CODE = 75
"""Of a process that ends because the training doesn't advance (EX_TEMPFAIL: trying again may help)."""


class Watchdog:
    """While entered, a thread publishes what this process is doing and ends it when nothing changes for `timeout`.

    A collective waits for the slowest process, so that a single one that hangs stops all. Each process writes to
    the store of the process group what it does and since when. The first to lose patience names the collective that
    it waits in, reads what all others have written, names those that came least far, and ends; the launcher then ends
    and restarts all. A process that the launcher no longer looks after, because it was killed, asks itself to stop,
    as SIGTERM would.
    """

    def __init__(self, ranks: Ranks, timeout: float) -> None:
        self._ranks, self._timeout = ranks, timeout
        self._doing = ("starting", 0, time.monotonic())  # what, how many things before it, since when
        self._done = threading.Event()
        self._parent = os.getppid()
        self._is_orphan = False
        if ranks.size > 1:
            # A connection of its own: the main thread's may be waiting for an answer.
            store = dist.distributed_c10d._get_default_store().clone()  # pyright: ignore[reportAttributeAccessIssue]
            self._store = PrefixStore("watchdog", store)
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def enter(self, what: str) -> None:
        """Say what this process begins to do."""
        self._doing = (what, self._doing[1] + 1, time.monotonic())

    def _watch(self) -> None:
        interval = min(1.0, self._timeout / 4)
        published = -1
        while not self._done.wait(interval):
            what, number, since = self._doing
            try:
                if number != published:
                    self._store.set(str(self._ranks.rank), json.dumps((number, what)))
                    published = number
                if time.monotonic() - since > self._timeout:
                    self._report(self._others())
                    break
            except Exception:  # the store lived in the launcher, and is gone with it
                if time.monotonic() - since > self._timeout:
                    self._report({})
                    break
            if os.getppid() != self._parent and not self._is_orphan:
                self._is_orphan = True
                with suppress(OSError):  # the terminal may be gone as well
                    print("The launcher of this process is gone; saving and stopping.", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGTERM)
        else:
            return
        os._exit(EXIT_CODE)

    def _others(self) -> dict[int, tuple[int, str]]:
        keys = [str(rank) for rank in range(self._ranks.size)]
        known = [key for key in keys if self._store.check([key])]
        return {
            int(key): tuple(json.loads(value)) for key, value in zip(known, self._store.multi_get(known), strict=True)
        }

    def _report(self, others: dict[int, tuple[int, str]]) -> None:
        what, number, _ = self._doing
        others[self._ranks.rank] = (number, what)
        least = min(others.values())[0]
        behind = [(rank, doing) for rank, (count, doing) in sorted(others.items()) if count == least]
        named = ", ".join(f"rank {rank} in {doing!r}" for rank, doing in behind[:8])
        print(
            f"mars: rank {self._ranks.rank} has waited {self._timeout:g} s in {what!r}{_collective()}; "
            f"least far came {named}. "
            "Ending, so that the launcher can start again. If the work really takes so long, raise --train.timeout.",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=False)

    def __enter__(self) -> Self:
        if self._ranks.size > 1:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done.set()
        if self._ranks.size > 1:
            self._thread.join()


def record_collectives() -> None:
    """Have PyTorch's flight recorder keep the last collectives; before the process group is made."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "1000")


def _collective() -> str:
    """The oldest collective that this process has begun and not ended; empty if there is none."""
    with suppress(Exception):  # the recorder's form is PyTorch's own affair, and the rest of the message must come
        for entry in json.loads(_dump_fr_trace_json(True, False))["entries"]:
            if not entry["retired"] and entry["state"] != "completed":
                group, shapes = entry["process_group"][-1], entry["input_sizes"]
                return f", in {entry['profiling_name']} number {entry['collective_seq_id']} of {group}, shapes {shapes}"
    return ""
