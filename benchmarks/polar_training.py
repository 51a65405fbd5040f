"""Trains the default recipe with each way to compute polar factors; table and figure.

    python benchmarks/polar_training.py [--steps 400] [--batch-size 16] [--seeds 0 1 2] [--out benchmarks/results]

The figure goes to docs/figures/polar_training.png. Finished runs are kept in runs/polar and not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib
import torch

from mars_lab.recipes.registry import find
from mars_lab.training import launch, optimizers
from mars_lab.training.allocator import keep_freed_memory
from mars_lab.training.loop import train
from mars_lab.training.run_folder import RunFolder
from mars_optim import param_groups

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
METHODS: dict[str, dict[str, Any]] = {
    "svd": {"polar_method": "svd", "polar_dtype": None},
    "newton": {"polar_method": "newton", "polar_dtype": None},
    "qdwh": {"polar_method": "qdwh", "polar_dtype": None},
    "polar-express 6 bf16": {"polar_coefficients": "polar-express", "polar_dtype": torch.bfloat16},
    "polar-express 6 fp32": {"polar_coefficients": "polar-express", "polar_dtype": torch.float32},
    "degree 17 bf16": {"polar_coefficients": "degree-17", "polar_dtype": torch.bfloat16},
    "you 5 bf16": {"polar_coefficients": "you", "polar_dtype": torch.bfloat16},
    "jordan 5 bf16": {"polar_coefficients": "jordan", "polar_dtype": torch.bfloat16},
    "sketch, rank 160": {"polar_method": "sketch", "polar_rank": 160, "polar_dtype": None},
    "sketch, rank 64": {"polar_method": "sketch", "polar_rank": 64, "polar_dtype": None},
}


def run(name: str, seed: int, steps: int, batch_size: int) -> list[tuple[int, float]]:
    """Return (step, validation loss) of one run."""
    config = find("mars-m").config
    settings = dataclasses.replace(
        config.train, num_steps=steps, batch_size=batch_size, seed=seed, eval_every=max(1, steps // 6)
    ).resolved()
    config = dataclasses.replace(config, train=settings)
    label = f"{name.replace(' ', '-').replace(',', '')}-{steps}x{batch_size}-{seed}"
    path = Path("runs/polar") / label
    if not (path / "summary.json").exists():
        optimizers.param_groups = lambda model, kind, **options: param_groups(model, kind, **options | METHODS[name])
        task, folder = launch.start(config, path.parent, label, numbered=False)
        train(task, config, folder, quiet=True)
    rows = [json.loads(line) for line in RunFolder(path).path.joinpath("metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    keep_freed_memory()
    curves = {(name, s): run(name, s, args.steps, args.batch_size) for s in args.seeds for name in METHODS}
    oracle = [curves["svd", s][-1][1] for s in args.seeds]
    lines = [f"{args.steps} steps, batch {args.batch_size}, seeds {args.seeds}", ""]
    lines += ["| method | validation loss | difference of the means from svd |", "|---|---|---|"]
    figure, (axes, final) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    noise = statistics.stdev(oracle) if len(oracle) > 1 else 0.0
    final.axvspan(-noise, noise, color="0.9", label="spread of svd's seeds")
    for i, name in enumerate(METHODS):
        last = [curves[name, s][-1][1] for s in args.seeds]
        spread = statistics.stdev(last) if len(last) > 1 else 0.0
        difference = statistics.mean(last) - statistics.mean(oracle)
        final.plot([loss - statistics.mean(oracle) for loss in last], [i] * len(last), "o", color=f"C{i}", alpha=0.5)
        final.plot([difference], [i], "|", color=f"C{i}", markersize=16, markeredgewidth=2)
        lines.append(f"| {name} | {statistics.mean(last):.4f} ± {spread:.4f} | {difference:+.4f} |")
        points = [statistics.mean(curves[name, s][k][1] for s in args.seeds) for k in range(len(curves[name, 0]))]
        steps = [step for step, _ in curves[name, args.seeds[0]]]
        axes.plot(steps, points, label=name, color=f"C{i}", linestyle=["-", "--", "-.", ":"][i % 4], linewidth=1.6)
    axes.set(xlabel="step", ylabel="validation loss, nats per token")
    axes.set_title(f"MARS-M by polar method: means over {len(args.seeds)} seeds")
    axes.legend(fontsize=8)
    final.set(xlabel="last loss less the mean of svd's: each seed, and the mean", yticks=range(len(METHODS)))
    final.set_yticklabels(METHODS)
    final.invert_yaxis()
    final.legend(fontsize=8, loc="upper right")
    figure.savefig(ROOT / "docs" / "figures" / "polar_training.png", dpi=130)
    text = "\n".join(lines)
    print(text)
    args.out.joinpath(f"polar_training_{datetime.date.today().isoformat()}.md").write_text(
        text + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
