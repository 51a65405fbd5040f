"""Functions run by several processes that can talk to each other, as torchrun would start them."""

import multiprocessing
import os
import socket
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["mars_lab.training.launch", "torch.distributed.checkpoint.state_dict_saver"])


def run_ranks(work: Callable[..., Any], size: int, *arguments: Any, timeout: float = 120) -> list[Any]:
    """What `work(*arguments)` returns in each of `size` processes, by rank; fails if one fails or takes too long."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(size)]
    processes = [
        _CONTEXT.Process(target=_child, args=(pipes[rank][1], work, rank, size, port, arguments), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    try:
        results = []
        for rank, (receiver, _) in enumerate(pipes):
            assert receiver.poll(timeout), f"rank {rank} of {work.__name__} is not done after {timeout} s"
            error, result = receiver.recv()
            assert error is None, f"rank {rank}:\n{error}"
            results.append(result)
        return results
    finally:
        for process in processes:
            process.kill()
            process.join()


def _child(sender: Connection, work: Callable[..., Any], rank: int, size: int, port: int, arguments: Any) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    os.environ.update(zip(names, map(str, (rank, size, rank, size, "localhost", port)), strict=True))
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")  # the compiler's own, and
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    try:
        sender.send((None, work(*arguments)))
    except BaseException:
        sender.send((traceback.format_exc(), None))
