"""Starting several processes on this machine with torch's elastic agent, and starting them again when one fails."""

import os
import sys
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mars_lab.errors import TrainingError
from mars_lab.training.interruption import Interrupted


def launch(arguments: Sequence[str], num_processes: int, *, max_restarts: int) -> None:
    """Run `python ARGUMENTS` in `num_processes` processes until all have ended well.

    When one fails all are ended and started again, at most `max_restarts` times. Ctrl-C and SIGTERM are passed on.

    Raises:
        Interrupted: Ctrl-C or SIGTERM.
        TrainingError: a process failed once more.
    """
    # With a store that outlives a restart, gloo finds the addresses of the processes that are gone.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    # More threads than cores make each other wait.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=max_restarts,
    )
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except SignalException as stopped:
        raise Interrupted("stopped", stopped.sigval) from None
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        raise TrainingError(
            f"process {rank} ended with exit code {failure.exitcode} ({failure.signal_name()}) after "
            f"{max_restarts} restarts; what it wrote is above"
        ) from None
