"""Trains a shortened default recipe on two processes with each precision in which matrices can travel; a table.

    python benchmarks/exchange_training.py [--steps 100] [--batch-size 8] [--seeds 0 1 2 3] [--out benchmarks/results]

Finished runs are kept in runs/exchange and not repeated.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from pathlib import Path

from mars_lab.cli import main as mars

ROOT = Path(__file__).parent.parent
RUNS = Path("runs/exchange")
PRECISIONS = ("bf16", "8bit")


def last_loss(precision: str, seed: int, steps: int, batch_size: int) -> float:
    """Return the validation loss that a run ends with."""
    label = f"{precision}-{steps}x{batch_size}-{seed}"
    if not (RUNS / label / "summary.json").exists():
        command = f"""train mars-m --nproc 2 --parallel fsdp --train.precision bf16 --sample-tokens 0
            --optimizer.exchange-precision {precision} --train.num-steps {steps} --train.batch-size {batch_size}
            --train.eval-every {steps} --train.seed {seed} --runs {RUNS} --name {label}"""
        mars(command.split())
    rows = [json.loads(line) for line in (RUNS / label / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["val_loss"] for row in rows if "val_loss" in row][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    losses = {p: [last_loss(p, s, args.steps, args.batch_size) for s in args.seeds] for p in PRECISIONS}
    lines = [
        "# Final loss by the precision in which matrices travel",
        "",
        f"The default recipe (MARS-M, 4 layers of width 192) with bf16, FSDP on two CPU processes, {args.steps} steps "
        f"of {args.batch_size} sequences, seeds {', '.join(map(str, args.seeds))}; `python "
        "benchmarks/exchange_training.py`.",
        "",
        "| exchange_precision | validation loss, mean and deviation | of each seed | difference from bf16, same seed |",
        "| --- | --- | --- | --- |",
    ]
    for precision, of_seeds in losses.items():
        differences = [a - b for a, b in zip(of_seeds, losses["bf16"], strict=True)]
        lines.append(
            f"| {precision} | {_summary(of_seeds)} | {', '.join(f'{loss:.4f}' for loss in of_seeds)} | "
            f"{_summary(differences)} |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    path = args.out / f"exchange_training_{datetime.date.today().isoformat()}.md"
    path.write_text(text, encoding="utf-8")


def _summary(values: list[float]) -> str:
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.4f}"


if __name__ == "__main__":
    main()
