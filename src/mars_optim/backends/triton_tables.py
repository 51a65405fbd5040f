"""Tables that kernels read on the device: uploaded once, from pinned memory, without waiting.

A captured upload reads its pinned memory again at every replay, so what a CUDA graph has seen stays alive and
unchanged for good: a few kilobytes a capture. Pinned memory cannot be counted on to be allocated during a capture;
the eager step before it, which every capture needs, leaves a spare buffer.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import accumulate

import torch
from torch import Tensor

BLOCK_SIZE = 1024  # elements that one program works on
_MOST_TABLES = 64  # of batches and patterns of gradient addresses

_block_maps: dict[tuple[torch.device, tuple[int, ...]], tuple[Tensor, list[int]]] = {}
_tables: OrderedDict[tuple[torch.device, int, bytes], Tensor] = OrderedDict()
_spares: dict[int, Tensor] = {}
_captured: list[Tensor] = []


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched on the device now becomes part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def upload(host: Tensor, device: torch.device) -> Tensor:
    """Return a copy on the device, ready for what follows on the current stream."""
    if device.type != "cuda":
        return host.to(device)
    if not is_capturing(device):
        return host.pin_memory().to(device, non_blocking=True)
    pinned = _spares.pop(host.nbytes, None)
    if pinned is None:
        pinned = torch.empty(host.nbytes, dtype=torch.uint8, pin_memory=True)
    pinned.copy_(host.reshape(-1).view(torch.uint8))
    _captured.append(pinned)
    return pinned.view(host.dtype).view(host.shape).to(device, non_blocking=True)


def leave_spare(num_bytes: int, device: torch.device) -> None:
    """Pin memory that a capture will find when it uploads as many bytes."""
    if device.type == "cuda" and num_bytes not in _spares and not is_capturing(device):
        _spares[num_bytes] = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


def block_map(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, list[int]]:
    """Return (tensor, block in it) for every program, int32 of shape (n, 2), and each tensor's first program.

    Kept for good, since graphs may read it; there is one for each combination of tensors.
    """
    found = _block_maps.get((device, sizes))
    if found is not None:
        return found
    counts = [-(-n // BLOCK_SIZE) for n in sizes]
    firsts = [0, *accumulate(counts)][:-1]
    tensors = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(counts))
    blocks = torch.stack([tensors, torch.arange(len(tensors)) - torch.tensor(firsts)[tensors]], dim=1)
    made = upload(blocks.to(torch.int32), device), firsts
    if not is_capturing(device):  # else nothing is there before a replay
        _block_maps[device, sizes] = made
    return made


def table(words: bytes, device: torch.device) -> Tensor:
    """Return 64-bit words on the device; the most recent ones are found there already."""
    host = torch.frombuffer(bytearray(words), dtype=torch.int64)
    if is_capturing(device):
        return upload(host, device)
    # Memory is reused in the order of its stream: another stream's table may be gone too early.
    key = (device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0, words)
    found = _tables.pop(key, None)
    _tables[key] = upload(host, device) if found is None else found
    if len(_tables) > _MOST_TABLES:
        _tables.popitem(last=False)
    return _tables[key]
