"""Trains one small model on several processes in every layout and compares it with one process: the equality table.

    python tests/sharded_checks.py [TEXT]     # prints a row for each case (with TEXT in its name)

Each case is 20 steps in float64 (or as it says) on the same global batches. `train`: the largest difference between
any two weights of the model trained on many processes and on one. `move`: the same where the second half of the steps
is taken in another layout, through a checkpoint. `rounds`: the same as `train` where few matrices travel at a time.
`oracle`: the difference from the same layout with `gather_matrices=True`. `count`: 0 where a step's collectives are the
cost model's. `contain`: 0 where an inf or nan stays in its matrix.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
import tempfile
import traceback
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp._common_utils import _set_fsdp_flattened
from torch.distributed.fsdp._flat_param import FlatParameter
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.multiprocessing.spawn import start_processes

from mars_optim import MARS, Preconditioner, register_preconditioner
from mars_optim.backends import Backend
from mars_optim.batch import Batch
from mars_optim.sharding import plan, replicas
from sharded_cases import CASES, LAYOUTS
from sharded_traffic import Traffic, counted
from sharded_training import STEPS, Case, build, optimizer_of, spread, train, whole


def _difference(case: Case) -> float:
    alone = build(case)
    own = {name: value for name, value in case.options.items() if name != "gather_matrices"}
    train(case, alone, optimizer_of(replace(case, options=own), alone))
    model, options, rank, num_ranks = spread(case, build(case))
    optimizer = optimizer_of(case, model, **options)
    train(case, model, optimizer, rank, num_ranks)
    if case.options.get("skip_nonfinite"):
        assert optimizer.num_skipped_steps == 1
    largest = 0.0
    for expected, p in zip(alone.parameters(), model.parameters(), strict=True):
        found = whole(p)
        largest = max(largest, float((found - expected.detach()).abs().max()))
        first = found.clone()
        dist.broadcast(first, 0)
        assert torch.equal(found, first), "ranks disagree"
    return largest


def _from_oracle(case: Case) -> float:
    """The weights' difference between matrices exchanged and gathered whole on every rank."""
    weights: list[list[Tensor]] = []
    for options in ({}, {"gather_matrices": True}):
        model, own, rank, num_ranks = spread(case, build(case))
        train(case, model, optimizer_of(case, model, **own, **options), rank, num_ranks)
        weights.append([whole(p) for p in model.parameters()])
    return max(float((a - b).abs().max()) for a, b in zip(*weights, strict=True))


def _moved(case: Case) -> float:
    """Half of the steps in the case's layout, half in others: the weights' difference from all in one process."""
    together = build(case)
    train(case, together, optimizer_of(case, together))
    model, optimizer = _half(case)
    largest = 0.0
    for layout in case.to:
        other = replace(case, layout=layout)
        moved = _as_plain(case, other, model, optimizer) if "alone" in (case.layout, layout) else None
        moved = moved or _through_checkpoint(other, model, optimizer)
        for p, expected in zip(moved.parameters(), together.parameters(), strict=True):
            largest = max(largest, float((whole(p) - expected.detach()).abs().max()))
    return largest


def _half(
    case: Case, weights: dict[str, Tensor] | None = None, state: dict[str, Any] | None = None
) -> tuple[nn.Module, MARS]:
    """The first half of the steps, or the second from given weights and optimizer state."""
    model, options, rank, num_ranks = build(case), {}, 0, 1
    if weights is not None:
        model.load_state_dict({name.removeprefix("module."): tensor for name, tensor in weights.items()})
    if case.layout != "alone":
        model, options, rank, num_ranks = spread(case, model)
    optimizer = optimizer_of(case, model, **options)
    if state is not None:
        optimizer.load_state_dict(state)
    start, stop = (0, STEPS // 2) if state is None else (STEPS // 2, STEPS)
    train(case, model, optimizer, rank, num_ranks, start, stop)
    return model, optimizer


def _as_plain(case: Case, other: Case, model: nn.Module, optimizer: MARS) -> nn.Module:
    """Go on from plain tensors, as `torch.save` would keep them, or to them."""
    weights = {name: whole(p).clone() for name, p in model.state_dict().items()}
    if "sharded" not in case.layout:
        return _half(other, weights, copy.deepcopy(optimizer.state_dict()))[0]
    received = [optimizer.consolidated_state_dict()]
    dist.broadcast_object_list(received, 0)
    return _half(other, weights, received[0])[0]


def _through_checkpoint(other: Case, model: nn.Module, optimizer: MARS) -> nn.Module:
    """Go on through `torch.distributed.checkpoint`."""
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder, 0)
    weights, state = get_state_dict(model, optimizer)
    save({"model": weights, "optimizer": state}, checkpoint_id=folder[0])
    moved, options, rank, num_ranks = spread(other, build(other))
    optimizer = optimizer_of(other, moved, **options)
    weights, state = get_state_dict(moved, optimizer)
    load({"model": weights, "optimizer": state}, checkpoint_id=folder[0])
    set_state_dict(moved, optimizer, model_state_dict=weights, optim_state_dict=state)
    train(other, moved, optimizer, rank, num_ranks, STEPS // 2, STEPS)
    dist.barrier()
    shutil.rmtree(folder[0], ignore_errors=True)
    return moved


def _contained(case: Case) -> float:
    """0 where an inf or nan in one piece of a gradient makes that matrix nan, and nothing else."""
    options = case.options | {"clip_norm": None, "max_grad_norm": None}
    for bad in (torch.inf, torch.nan):
        model, _, rank, num_ranks = spread(case, build(case))
        optimizer = optimizer_of(replace(case, options=options), model)
        train(case, model, optimizer, rank, num_ranks, 0, 1)
        spoilt = next(p for name, p in model.named_parameters() if name.endswith("1.qkv.weight"))
        assert isinstance(spoilt.grad, DTensor)
        mesh = spoilt.grad.device_mesh
        if mesh.get_local_rank(mesh.ndim - 1) == 0:  # on every replica
            spoilt.grad.to_local()[0, 0] = bad
        optimizer.step()
        for p in model.parameters():
            found = whole(p).isnan()
            if p is spoilt:
                query = found[: len(found) // 3]
                assert query.all(), f"{query.sum()} of the matrix's {query.numel()} elements are nan"
                found = found[len(query) :]
            assert not found.any(), "nan reached another matrix"
    return 0.0


class _Normalised:
    """Not elementwise, and it does not say so."""

    def __call__(self, backend: Backend, batch: Batch) -> None:
        backend.descend_(batch, [m / m.norm() for m in backend.momentum_(batch)], batch.update_scales)


def _refused(case: Case) -> float:
    """0 where everything that has no right step on several ranks is refused, with a word of what to use instead."""
    register_preconditioner("normalised", Preconditioner(_Normalised()))
    group, mesh = dist.group.WORLD, init_device_mesh("cpu", (case.world,))
    pieces = distribute_tensor(torch.randn(6, 4), mesh, [Shard(0)])
    kernels = nn.Parameter(distribute_tensor(torch.randn(6, 4, 3), mesh, [Shard(0)]))
    partial = DTensor.from_local(torch.randn(6, 4), mesh, [Partial()])
    plain = nn.Parameter(torch.randn(4, 4))
    original = nn.Parameter(torch.randn(7))  # FSDP1 itself wants an accelerator; so it marks its parameters
    _set_fsdp_flattened(original)
    refused: tuple[tuple[list[Tensor], dict[str, Any], str], ...] = (
        ([original], {}, "fully_shard"),
        ([FlatParameter(torch.randn(7))], {"mars_type": "m"}, "fully_shard"),
        ([nn.Parameter(pieces)], {"preconditioner": "normalised"}, "is_elementwise=True"),
        ([nn.Parameter(pieces)], {"offload_state": True}, "CPUOffloadPolicy"),
        ([nn.Parameter(pieces)], {"differentiable": True, "fused": False}, "plain tensors"),
        ([kernels], {"mars_type": "m", "matrix_view": ("split", 1, (6, 6))}, "split dimension 0"),
        ([nn.Parameter(partial)], {}, "redistribute"),
        ([plain], {"shard_state": True}, "process_group"),
        ([plain], {"shard_state": True, "process_group": group, "is_approx": False}, "fully_shard"),
    )
    for params, options, remedy in refused:
        with pytest.raises(ValueError, match=remedy):
            MARS(params, **options)
    return 0.0


def _in_rounds(case: Case) -> float:
    """As `train`, with so little in a round, or bucket, that there are many."""
    before = plan.ROUND_ELEMENTS, replicas.BUCKET_BYTES
    plan.ROUND_ELEMENTS, replicas.BUCKET_BYTES = 150, 1000
    plan.make_plan.cache_clear()
    try:
        with Traffic() as traffic:
            difference = _difference(case)
    finally:
        plan.ROUND_ELEMENTS, replicas.BUCKET_BYTES = before
        plan.make_plan.cache_clear()
    most = max(count for count, _ in traffic.found.values())
    assert most >= 4 * STEPS, f"{traffic.found}: there was one round"
    return difference


def _partial(case: Case) -> float:
    """Gradients that tensor parallelism leaves as partial sums: the difference from steps with their sum."""
    torch.manual_seed(2)
    value, parts = torch.randn(6, 4, dtype=torch.float64), torch.randn(3, case.world, 6, 4, dtype=torch.float64)
    mesh = init_device_mesh("cpu", (case.world,))
    pieces, plain = nn.Parameter(distribute_tensor(value, mesh, [Shard(0)])), nn.Parameter(value.clone())
    mine, alone = (MARS([p], lr=0.1, mars_type=case.mars_type, gamma=0.1, weight_decay=0.1) for p in (pieces, plain))
    for step in parts:
        pieces.grad = DTensor.from_local(step[dist.get_rank()], mesh, [Partial()])
        plain.grad = step.sum(0)
        mine.step()
        alone.step()
    return float((whole(pieces) - plain.detach()).abs().max())


CHECKS = {
    "train": _difference,
    "oracle": _from_oracle,
    "move": _moved,
    "count": counted,
    "refuse": _refused,
    "partial": _partial,
    "contain": _contained,
    "rounds": _in_rounds,
}


def _work(rank: int, world: int, folder: str, containing: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/{world}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    results: dict[str, float | str] = {}
    for case in CASES:
        if case.world == world and containing in case.name:
            try:
                results[case.name] = CHECKS[case.check](case)
            except Exception:  # of one case; the others are still worth having
                results[case.name] = traceback.format_exc()
        Path(folder, f"{world}-{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def run(world: int, containing: str = "") -> dict[str, float | str]:
    """Return what each case of `world` processes came to: a difference, or the traceback of any rank."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_work, (world, folder, containing), nprocs=world, start_method="spawn")
        results: dict[str, float | str] = {}
        for rank in range(world):
            for name, result in json.loads(Path(folder, f"{world}-{rank}.json").read_text()).items():
                if isinstance(result, str) or name not in results:
                    results[name] = result
    return results


if __name__ == "__main__":
    tolerances = {case.name: case.tolerance for case in CASES}
    failed = False
    print("| ranks, layout, type, check, options | difference | bound |\n| --- | --- | --- |")
    for world in LAYOUTS:
        for name, result in run(world, sys.argv[1] if sys.argv[1:] else "").items():
            if isinstance(result, str):
                failed = True
                print(f"| {name} | {result.strip()} | |")
            else:
                failed |= not result <= tolerances[name]
                print(f"| {name} | {result:.1e} | {tolerances[name]:g} |")
    sys.exit(failed)
