"""Speed of polar factors: interleaved medians in one process, as JSON and as a dated table.

    python benchmarks/polar.py [--layers 12] [--repeats 7] [--threads 2] [--out benchmarks/results]
    python benchmarks/polar.py --device cuda            # 24 x 2048 x 8192 in bfloat16

CPU: the hidden matrices of GPT-2 small. `torch.optim.Muon` is its whole step (momentum, 5 Jordan steps in bfloat16
whatever the parameters' dtype, update); `polar` is `polar_factors` as it is by default (three polynomials of degree 17
in bfloat16, 6 Polar Express steps in fp32) or by 6 Polar Express steps.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mars_optim.polar import PolarMethod, polar_factor, polar_factors, use_triton

ROOT = Path(__file__).parent.parent
LAYER = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]
JORDAN = (3.4445, -4.7750, 2.0315)
Work = dict[str, Callable[[], object]]


def standard(x: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz as it is usually written: five Jordan steps."""
    a, b, c = JORDAN
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def cpu_work(layers: int) -> Work:
    shapes = LAYER * layers
    work: Work = {}
    half, full = PolarMethod(dtype=torch.bfloat16), PolarMethod(dtype=torch.float32)
    six = PolarMethod(dtype=torch.bfloat16, coefficients="polar-express")
    for label, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        params = [torch.nn.Parameter(torch.randn(s).to(dtype)) for s in shapes]
        for p in params:
            p.grad = torch.randn_like(p)
        muon = torch.optim.Muon(params, lr=1e-3)
        matrices = [p.grad for p in params if p.grad is not None]
        work[f"{label} parameters: torch.optim.Muon, whole step"] = muon.step
        work[f"{label} parameters: polar, bf16 arithmetic"] = lambda m=matrices: [polar_factors([x], half) for x in m]
        work[f"{label} parameters: polar, bf16 arithmetic, 6 Polar Express steps"] = lambda m=matrices: [
            polar_factors([x], six) for x in m
        ]
        if label == "fp32":
            work["fp32 parameters: polar, fp32 arithmetic"] = lambda m=matrices: [polar_factors([x], full) for x in m]
            work["fp32 parameters: Muon's 5 Jordan steps in fp32"] = lambda m=matrices: [standard(x) for x in m]
    return work


def cuda_work(batch: int) -> Work:
    x = torch.randn(batch, 2048, 8192, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(standard)

    def with_kernel(how: PolarMethod) -> Tensor:
        use_triton(True)
        try:
            return polar_factors([x], how)[0]
        finally:
            use_triton(False)

    work: Work = {"torch.compile of 5 standard Jordan steps": lambda: compiled(x)}
    for name, how in (("default", PolarMethod()), ("6 Polar Express steps", PolarMethod(coefficients="polar-express"))):
        work[f"polar, {name}"] = lambda how=how: polar_factors([x], how)
        work[f"polar, {name}, Triton"] = lambda how=how: with_kernel(how)
    return work


def interleaved(work: Work, repeats: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of each, one after the other, `repeats` times, after one warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for i in range(repeats + 1):
        for name, function in work.items():
            begin = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            if i:
                times[name].append((time.perf_counter() - begin) * 1e3)
    return times


def band(dtype: torch.dtype, device: str, coefficients: str | None) -> tuple[float, float]:
    """Singular values out, for singular values down to 3e-3 of the Frobenius norm in (geometric, 768 x 3072)."""
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(768, 768, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(3072, 768, generator=generator))
    sigma = torch.logspace(0, -1.5, 768)
    assert abs(sigma[-1] / sigma.norm() - 3e-3) < 2e-4
    out = torch.linalg.svdvals(
        polar_factor(((u * sigma) @ v.T).to(device), dtype=dtype, coefficients=coefficients).float()
    )
    return out.min().item(), out.max().item()


def bf16_rate(device: str) -> float:
    """GFLOP/s of a plain product of the size of the benchmark's."""
    n, k = (768, 3072) if device == "cpu" else (8192, 8192)
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    b = torch.randn(n, k, device=device, dtype=torch.bfloat16)
    times = interleaved({"mm": lambda: torch.mm(a, b)}, 20, device)["mm"]
    return 2 * n * n * k / statistics.median(times) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--hardware", default=None, help="name for the results file")
    parser.add_argument("--out", type=Path, default=None, help="folder for the JSON file and the table")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    work = cpu_work(args.layers) if args.device == "cpu" else cuda_work(args.batch)
    times = interleaved(work, args.repeats, args.device)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU",
        "threads": args.threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
        "shapes": f"{args.layers} x {LAYER}" if args.device == "cpu" else [args.batch, 2048, 8192],
        "bf16_gflops": bf16_rate(args.device),
        "band_bf16": band(torch.bfloat16, args.device, None),
        "band_bf16_polar_express": band(torch.bfloat16, args.device, "polar-express"),
        "band_fp32": band(torch.float32, args.device, None),
        "ms": {name: {"median": statistics.median(t), "min": min(t), "max": max(t)} for name, t in times.items()},
    }
    text = table(result)
    print(text)
    if args.out is not None:
        slug = args.hardware or re.sub(r"[^a-z0-9]+", "-", f"{args.threads}-core {result['device']}".lower()).strip("-")
        stem = args.out / f"polar_{slug}_{result['date']}"
        stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        stem.with_suffix(".md").write_text(text + "\n", encoding="utf-8")


def _text(band: tuple[float, float]) -> str:
    return f"[{band[0]:.4f}, {band[1]:.4f}]"


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['date']}, {result['device']}, {result['threads']} threads, torch {result['torch']}, "
        f"commit {result['commit']}, {result['shapes']}.",
        f"Plain bf16 product: {result['bf16_gflops']:.0f} GFLOP/s. Singular values from 3e-3 of the norm on end in "
        f"{_text(result['band_bf16'])} in bf16 (6 Polar Express steps: {_text(result['band_bf16_polar_express'])}) and "
        f"{_text(result['band_fp32'])} in fp32.",
        "",
        "| | median ms | min to max | to the first of its kind |",
        "|---|---|---|---|",
    ]
    base = 0.0
    for name, ms in result["ms"].items():
        base = ms["median"] if "Muon, whole" in name or "torch.compile" in name else base
        ratio = ms["median"] / base
        lines.append(f"| {name} | {ms['median']:.1f} | {ms['min']:.1f} to {ms['max']:.1f} | {ratio:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
