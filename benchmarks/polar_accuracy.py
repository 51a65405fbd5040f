"""Accuracy of polar factors: method x dtype x spectrum, as a dated table and as a figure.

    python benchmarks/polar_accuracy.py [--buffers runs/NAME] [--out benchmarks/results]

`--buffers` is the folder of a run of `mars train`; its newest checkpoint's momentum buffers become a spectrum. The
table shows the smallest and largest singular value of the factor over the directions whose singular value is at least
3e-3 of the Frobenius norm, and ||O - U V^T||_F / sqrt(rank) over these and over all, against numpy's SVD in float64.
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor

from mars_lab.training.checkpoint import plain
from mars_optim import polar_factor

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
FLOOR = 3e-3
METHODS: dict[str, dict[str, Any]] = {
    "svd fp32": {"method": "svd", "dtype": torch.float32},
    "newton fp32": {"method": "newton", "dtype": torch.float32},
    "newton fp64": {"method": "newton", "dtype": torch.float64},
    "qdwh fp32": {"method": "qdwh", "dtype": torch.float32},
    "qdwh fp64": {"method": "qdwh", "dtype": torch.float64},
    "degree 17 fp32": {"dtype": torch.float32, "coefficients": "degree-17"},
    "degree 17 bf16": {"dtype": torch.bfloat16, "coefficients": "degree-17"},
    "degree 17 fp16": {"dtype": torch.float16, "coefficients": "degree-17"},
    "polar-express 6 fp64": {"dtype": torch.float64, "coefficients": "polar-express"},
    "polar-express 6 fp32": {"dtype": torch.float32, "coefficients": "polar-express"},
    "polar-express 6 fp32 standard": {"dtype": torch.float32, "coefficients": "polar-express", "form": "standard"},
    "polar-express 6 bf16": {"dtype": torch.bfloat16, "coefficients": "polar-express"},
    "polar-express 6 bf16 standard": {"dtype": torch.bfloat16, "coefficients": "polar-express", "form": "standard"},
    "polar-express 6 fp16": {"dtype": torch.float16, "coefficients": "polar-express"},
    "you 5 bf16": {"dtype": torch.bfloat16, "coefficients": "you"},
    "jordan 5 bf16": {"dtype": torch.bfloat16, "coefficients": "jordan"},
    "sketch, rank 64, fp32": {"method": "sketch", "rank": 64, "dtype": torch.float32},
}
COLUMNS = 768


def synthetic(rows: int) -> dict[str, list[Tensor]]:
    generator = np.random.default_rng(0)
    ones = np.ones(rows)
    return {
        "flat": [of_spectrum(ones, generator)],
        "geometric to 1e-3": [of_spectrum(np.logspace(0, -3, rows), generator)],
        "geometric to 1e-6": [of_spectrum(np.logspace(0, -6, rows), generator)],
        "a mean 40 times the rest": [of_spectrum(np.append(40.0, ones[1:]), generator, mean=True)],
        "Gaussian": [torch.from_numpy(generator.standard_normal((rows, COLUMNS)))],
    }


def of_spectrum(sigma: np.ndarray, generator: np.random.Generator, *, mean: bool = False) -> Tensor:
    """Random singular vectors; with `mean` the first ones have entries that are all alike."""
    u, v = (generator.standard_normal((n, len(sigma))) for n in (len(sigma), COLUMNS))
    if mean:
        u[:, 0] = v[:, 0] = 1
    return torch.from_numpy((np.linalg.qr(u)[0] * sigma) @ np.linalg.qr(v)[0].T)


def buffers(run: Path) -> list[Tensor]:
    """The momentum buffers of the matrices that are orthogonalised in a run of MARS-M (Q, K and V apart)."""
    checkpoint = plain.read_newest(run / "checkpoints")
    if checkpoint is None:
        raise SystemExit(f"{run} has no checkpoint; train it first")
    state = checkpoint["optimizer"][0]
    found: list[Tensor] = []
    for group in state["param_groups"]:
        for key in group["params"]:
            m = state["state"][key]["exp_avg"].double()
            if m.ndim == 2 and group["preconditioner"] != "adamw":
                view = group["matrix_view"]
                found += torch.split(m, list(view[2]), view[1]) if not isinstance(view, str) else [m]
    return found


def measure(matrix: Tensor, kind: dict[str, Any]) -> tuple[float, float, float, float]:
    """Return the smallest and largest singular value, and the distance from U V^T above the floor and over all."""
    u, sigma, vh = np.linalg.svd(matrix.numpy(), full_matrices=False)
    factor = polar_factor(matrix, **kind).double().numpy()
    count = int((sigma >= FLOOR * np.linalg.norm(sigma)).sum())
    band = np.linalg.svd(factor, compute_uv=False)[:count]
    above = np.linalg.norm(u[:, :count].T @ factor @ vh[:count].T - np.eye(count)) / count**0.5
    return band.min(), band.max(), float(above), float(np.linalg.norm(factor - u @ vh) / len(sigma) ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--buffers", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    matrices = synthetic(args.rows)
    if args.buffers is not None:
        matrices["momentum buffers"] = buffers(args.buffers)
    rows: dict[tuple[str, str], tuple[float, ...]] = {}
    for spectrum, some in matrices.items():
        for name, kind in METHODS.items():
            values = [measure(m, kind) for m in some]
            low = min(v[0] for v in values)
            rows[spectrum, name] = (low, *(max(v[i] for v in values) for i in (1, 2, 3)))
    text = table(rows, list(matrices), args.rows, len(matrices.get("momentum buffers", [])))
    print(text)
    (args.out / f"polar_accuracy_{datetime.date.today().isoformat()}.md").write_text(text + "\n", encoding="utf-8")
    plot(rows, list(matrices))


def table(rows: dict[tuple[str, str], tuple[float, ...]], spectra: list[str], size: int, count: int) -> str:
    lines = [
        f"{size} x {COLUMNS} matrices, torch {torch.__version__}; {count} momentum buffers, the worst of them counts. "
        f"Band and first distance: over singular values >= {FLOOR:g} of the norm; second distance: over all.",
        "",
        "| method | " + " | ".join(spectra) + " |",
        "|---" * (len(spectra) + 1) + "|",
    ]
    for name in METHODS:
        cells = [f"{lo:.4f} to {hi:.4f}; {e:.0e}; {f:.0e}" for lo, hi, e, f in (rows[s, name] for s in spectra)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: dict[tuple[str, str], tuple[float, ...]], spectra: list[str]) -> None:
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for i, spectrum in enumerate(spectra):
        errors = [max(rows[spectrum, name][2], 1e-16) for name in METHODS]
        axes.plot(errors, range(len(METHODS)), "os^DvP"[i % 6], label=spectrum, color=f"C{i}", alpha=0.8)
    axes.set_yticks(range(len(METHODS)), list(METHODS))
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="||O - UV'|| / sqrt(rank), singular values above 3e-3 of the norm")
    axes.set_title("Accuracy of the polar factor by method and spectrum")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(ROOT / "docs" / "figures" / "polar_accuracy.png", dpi=130)


if __name__ == "__main__":
    main()
