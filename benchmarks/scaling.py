"""The cost model as a table: what MARS-M adds to a step of 125M to 1T parameters on 8 to 4096 GPUs.

    python benchmarks/scaling.py

Nothing is measured here. Bytes and multiplications are read off the plan that the step follows; its collectives were
counted on up to four processes and found equal (`python tests/sharded_checks.py count`). Seconds are these numbers
over the rates of one H200 that `--tflops` and `--gbps` name, without overlap.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from mars_optim.costs import StepCost, TensorSpec, sharded_step


@dataclass(frozen=True)
class Shape:
    """A transformer as GPT-2: its matrices are 12 width^2 a layer."""

    name: str
    layers: int
    width: int
    vocabulary: int = 50304

    def tensors(self) -> list[TensorSpec]:
        """All parameters; fused Q, K and V are three matrices."""
        w = self.width
        layer = [
            TensorSpec((3 * w, w), ("split", 0, (w, w, w))),
            *(TensorSpec(shape, "flatten") for shape in ((w, w), (4 * w, w), (w, 4 * w))),
            *(TensorSpec((n,)) for n in (3 * w, w, 4 * w, w, w, w, w, w)),
        ]
        return [TensorSpec((self.vocabulary, w)), TensorSpec((w,)), TensorSpec((w,)), *(layer * self.layers)]


SHAPES = (
    Shape("125M", 12, 768),
    Shape("1.5B", 48, 1600),
    Shape("7B", 32, 4096),
    Shape("70B", 80, 8192),
    Shape("175B", 96, 12288),
    Shape("1T", 128, 25600),
)


def _row(shape: Shape, num_shards: int, num_replicas: int, tflops: float, gbps: float) -> str:
    tensors = shape.tensors()
    cost, coded = (
        sharded_step(tensors, num_shards=num_shards, num_replicas=num_replicas, exchange_precision=precision)
        for precision in ("bf16", "8bit")
    )
    numel = sum(t.numel for t in tensors)
    # Any optimizer under fully_shard: weights in bf16 gathered twice, gradients scattered in bf16 within the shards,
    # and added up across the replicas.
    share = (num_shards - 1) / num_shards
    moved = 3 * 2 * numel * share + (2 * 2 * numel / num_shards if num_replicas > 1 else 0)
    added, in_8bit = (_moved(c, num_replicas) for c in (cost, coded))
    multiplying = 2 * cost.multiply_adds / (tflops * 1e12)
    layout = f"FSDP {num_shards}" if num_replicas == 1 else f"HSDP {num_replicas} x {num_shards}"
    return (
        f"| {shape.name} | {layout} | {cost.state_bytes / 2**30:.3g} | {moved / 1e9:.3g} | {added / 1e9:.3g} | "
        f"{added / moved:.1%} | {in_8bit / 1e9:.3g} | {in_8bit / moved:.1%} | {2 * cost.multiply_adds / 1e12:.3g} | "
        f"{1e3 * multiplying:.3g} | {1e3 * added / gbps / 1e9:.3g} |"
    )


def _moved(cost: StepCost, num_replicas: int) -> int:
    """Bytes of matrices that a rank sends or receives."""
    return cost.all_to_all_bytes + cost.all_gather_bytes * (num_replicas - 1) + cost.broadcast_bytes


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tflops", type=float, default=790.0, help="multiplication in bf16, TFLOP/s a GPU")
    parser.add_argument("--gbps", type=float, default=50.0, help="GB/s a GPU sends to others")
    args = parser.parse_args()
    print(
        "| parameters | layout | state GiB a GPU | GB moved by any optimizer | GB added by MARS-M | added | "
        "GB added with 8bit | added | TFLOP of polar factors | "
        f"ms of them at {args.tflops:g} TFLOP/s | ms of GB added at {args.gbps:g} GB/s |\n" + "| --- " * 11 + "|"
    )
    for shape in SHAPES:
        for num_ranks in (8, 64, 512, 4096):
            print(_row(shape, num_ranks, 1, args.tflops, args.gbps), flush=True)
            if num_ranks > 64:
                print(_row(shape, 64, num_ranks // 64, args.tflops, args.gbps), flush=True)


if __name__ == "__main__":
    main()
