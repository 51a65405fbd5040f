"""Training curves under reduced precision: does it end within the seeds' spread of fp32?

    python benchmarks/precision.py [--steps 100] [--seeds 3]

Trains the default corpus and model with every way of storing state and weights, several seeds each, and writes a dated
table and figure. What differs within a seed is the precision alone: initial weights and batches are the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from measuring import surroundings, write

from mars_lab.recipes.registry import find
from mars_lab.training.allocator import keep_freed_memory
from mars_lab.training.config import RunConfig
from mars_lab.training.launch import start
from mars_lab.training.loop import train

# name -> (precision of the model, of the state, rounding of bf16 weights)
VARIANTS = {
    "fp32 state": ("bf16", "fp32", "remainder16"),
    "bf16 state": ("bf16", "bf16", "remainder16"),
    "8-bit state": ("bf16", "8bit", "remainder16"),
    "bf16 weights + 8-bit remainder, 8-bit state": ("bf16-params", "8bit", "remainder8"),
    "bf16 weights, rounded to nearest, fp32 state": ("bf16-params", "fp32", "nearest"),
}


def config_of(base: RunConfig, variant: str, seed: int, steps: int) -> RunConfig:
    precision, state, rounding = VARIANTS[variant]
    return replace(
        base,
        optimizer=replace(base.optimizer, state_precision=state, param_rounding=rounding),
        train=replace(base.train, precision=precision, num_steps=steps, seed=seed, eval_every=steps // 4).resolved(),
        task=replace(base.task, eval_sequences=128, sample_tokens=0),
    )


def run(config: RunConfig) -> list[tuple[int, float]]:
    """Return (step, validation loss) of a training."""
    with tempfile.TemporaryDirectory() as folder:
        task, run_folder = start(config, Path(folder), "it", numbered=False)
        train(task, config, run_folder, quiet=True)
        rows = [json.loads(line) for line in run_folder.metrics.read_text().splitlines()]
    return [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["mars-adamw", "mars-m"])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    keep_freed_memory()
    sections: dict[str, list[dict[str, object]]] = {}
    curves: dict[str, dict[str, list[list[tuple[int, float]]]]] = {}
    for name in arguments.recipes:
        base = find(name).config
        curves[name] = {}
        rows = sections.setdefault(f"{name}, {arguments.steps} steps, {arguments.seeds} seeds", [])
        for variant in VARIANTS:
            of_seeds = [run(config_of(base, variant, seed, arguments.steps)) for seed in range(arguments.seeds)]
            curves[name][variant] = of_seeds
            last = [curve[-1][1] for curve in of_seeds]
            full = [curve[-1][1] for curve in curves[name]["fp32 state"]]
            rows.append(
                {
                    "stored as": variant,
                    "final validation loss": f"{statistics.mean(last):.3f}",
                    "standard deviation over seeds": f"{statistics.stdev(last):.3f}" if len(last) > 1 else "",
                    "mean difference from fp32, same seed": f"{statistics.mean(last) - statistics.mean(full):+.4f}",
                    "each seed": " ".join(f"{value:.3f}" for value in last),
                }
            )
            print(name, rows[-1], flush=True)
    path = write("precision", surroundings("cpu"), sections, NOTES)
    plot(curves, path.with_suffix(".svg"))
    print(path)


def plot(curves: dict[str, dict[str, list[list[tuple[int, float]]]]], path: Path) -> None:
    import matplotlib.pyplot as plt

    colours = ["#000000", "#0072B2", "#009E73", "#D55E00", "#CC79A7"]
    figure, panels = plt.subplots(1, len(curves), figsize=(5.2 * len(curves), 4.4), layout="constrained", squeeze=False)
    for axes, (name, variants) in zip(panels[0], curves.items(), strict=True):
        for colour, (variant, of_seeds) in zip(colours, variants.items(), strict=True):
            for i, curve in enumerate(of_seeds):
                steps, losses = zip(*[point for point in curve if point[0] > 0], strict=True)
                axes.plot(steps, losses, color=colour, linewidth=1, alpha=0.8, label=None if i else variant)
        axes.set(title=name, xlabel="step", ylabel="validation loss")
        axes.legend(fontsize=7)
    figure.savefig(path)


NOTES = (
    "State of the Union corpus, the default model of 2.6 million parameters, bf16 autocast. Each line of the figure is "
    "one seed. Made by `benchmarks/precision.py`."
)

if __name__ == "__main__":
    main()
