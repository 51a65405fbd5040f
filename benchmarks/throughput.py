"""Tokens a second of `mars train`'s loop, against nanoGPT's and between optimizers, and its share of the matmul rate.

    python benchmarks/throughput.py --nanogpt ~/nanoGPT   # the default recipe's model, on the CPU
    python benchmarks/throughput.py --nanogpt ~/nanoGPT --model gpt2 --batch-size 12 --device cuda --compile
    python benchmarks/throughput.py --model gpt2 --device cuda --compile --optimizers adamw mars-adamw mars-m

Each loop is a process of its own that trains on the same random tokens; the processes take turns, round by round, and
the first steps of each do not count. A step is the time from one to the next as the loop itself lives it: data,
forward, backward, clipping, optimizer, logging; on a busy machine look at the fastest. nanoGPT runs from the checkout
given, as it is. Precision is nanoGPT's: on the CPU it knows fp32 only, on CUDA both run bf16 under autocast.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from measuring import interleaved, surroundings, timing, write

from mars_lab.data.tokenizer import END_OF_TEXT, GPT2_VOCAB_SIZE
from mars_lab.data.tokens import DataConfig
from mars_lab.models.gpt2 import GPT2, GPT2Config
from mars_lab.recipes import sotu
from mars_lab.recipes.registry import find
from mars_lab.tasks.language import LanguageConfig, LanguageTask
from mars_lab.training import launch
from mars_lab.training.allocator import keep_freed_memory
from mars_lab.training.config import RunConfig, TrainConfig
from mars_lab.training.loop import train

MODELS = {
    "default": GPT2Config(scale_attn_by_inverse_layer_idx=False),
    "gpt2": GPT2Config(12, 12, 768, 1024, 50304, scale_attn_by_inverse_layer_idx=False),
    "gpt2-medium": GPT2Config(24, 16, 1024, 1024, 50304, scale_attn_by_inverse_layer_idx=False),
}
WARM_UP = 4


class TimedTask(LanguageTask):
    """Notes when each training loss is asked for."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__(config, seed=0)
        self.times: list[float] = []

    def loss(self, model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        if model.training:
            self.times.append(time.perf_counter())
        return super().loss(model, batch)


def run_ours(options: argparse.Namespace, optimizer: str, folder: Path) -> list[float]:
    """Seconds of each step of `mars train` with `optimizer`."""
    keep_freed_memory()  # as the command does
    data = DataConfig(tokens=str(folder / "data" / "random"))
    config = RunConfig(
        LanguageConfig(MODELS[options.model], data, eval_sequences=1, eval_batch_size=1, sample_tokens=0),
        find(optimizer).config.optimizer,
        TrainConfig(
            num_steps=options.steps + WARM_UP + 1,
            batch_size=options.batch_size,
            eval_every=10**9,
            checkpoint_every=10**9,
            device=options.device,
            precision="bf16" if options.device == "cuda" else "fp32",
            compile=options.compile,
        ),
    )
    task = TimedTask(config.task)
    _, run = launch.start(config, folder / "runs", f"{optimizer}-{time.time_ns()}", numbered=False)
    train(task, config, run, quiet=True)  # pyright: ignore[reportArgumentType]
    return [later - earlier for earlier, later in zip(task.times, task.times[1:], strict=False)][WARM_UP:]


def run_nanogpt(options: argparse.Namespace, folder: Path) -> list[float]:
    """Seconds of each step as nanoGPT's `train.py` prints them."""
    model, checkout = MODELS[options.model], options.nanogpt.resolve()
    settings = {
        "dataset": "random", "device": options.device, "compile": options.compile,
        "dtype": "bfloat16" if options.device == "cuda" else "float32",
        "batch_size": options.batch_size, "gradient_accumulation_steps": 1, "max_iters": options.steps + WARM_UP,
        "block_size": model.context_length, "n_layer": model.num_layers, "n_head": model.num_heads,
        "n_embd": model.width, "bias": False, "dropout": 0.0, "eval_interval": 10**9, "eval_iters": 1,
        "log_interval": 1, "always_save_checkpoint": False, "wandb_log": False,
    }  # fmt: skip
    if not (folder / "configurator.py").exists():
        (folder / "configurator.py").symlink_to(checkout / "configurator.py")  # read from the working directory
    command = [sys.executable, str(checkout / "train.py"), *(f"--{key}={value}" for key, value in settings.items())]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"nanoGPT ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return [float(ms) / 1e3 for ms in re.findall(r"iter \d+: loss \S+, time ([\d.]+)ms", done.stdout)][WARM_UP + 1 :]


def random_tokens(folder: Path, vocab_size: int) -> None:
    """What both loops train on, and each one's note of the vocabulary."""
    data = folder / "data" / "random"
    data.mkdir(parents=True)
    values = np.random.default_rng(0).integers(0, min(vocab_size, GPT2_VOCAB_SIZE), 20_000_000, dtype=np.uint16)
    values.tofile(data / "train.bin")
    values[:1_000_000].tofile(data / "val.bin")
    if vocab_size < GPT2_VOCAB_SIZE:
        words = {END_OF_TEXT: 0} | {str(number): number for number in range(1, vocab_size)}
        tokenizers.Tokenizer(tokenizers.models.WordLevel(words)).save(str(data / "tokenizer.json"))
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size}))


def in_process(options: argparse.Namespace, optimizer: str, folder: Path) -> list[float]:
    arguments = [sys.executable, __file__, *sys.argv[1:], "--worker", optimizer, "--folder", str(folder)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{optimizer} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def flops_per_token(model: GPT2Config) -> float:
    """6 N + 12 L D T: parameters without position embeddings, and attention."""
    with torch.device("meta"):
        num_parameters = sum(p.numel() for p in GPT2(model).parameters()) - model.context_length * model.width
    return 6 * num_parameters + 12 * model.num_layers * model.width * model.context_length


def matmul_rate(device: str) -> float:
    """Flops a second of a large product in the precision of the runs."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / (interleaved({"mm": lambda: a @ b}, 9, device=device)["mm"].median / 1e3)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--model", choices=list(MODELS), default="default")
    parser.add_argument("--optimizers", nargs="+", choices=list(sotu.recipes()), default=["adamw"])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.worker:
        print(json.dumps(run_ours(options, options.worker, options.folder)))
        return
    model = MODELS[options.model]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_tokens(folder, model.vocab_size)
        seconds: dict[str, list[float]] = {}
        for _ in range(options.rounds):
            if options.nanogpt:
                seconds.setdefault("nanoGPT", []).extend(run_nanogpt(options, folder))
            for optimizer in options.optimizers:
                seconds.setdefault(f"mars train {optimizer}", []).extend(in_process(options, optimizer, folder))
    rate = matmul_rate(options.device)
    tokens = options.batch_size * model.context_length
    base = statistics.median(next(iter(seconds.values())))
    rows: list[dict[str, Any]] = []
    for loop, times in seconds.items():
        median = statistics.median(times)
        share = flops_per_token(model) * tokens / median / rate
        row = {
            "loop": loop,
            "ms a step": timing([1e3 * t for t in times]),
            "fastest": 1e3 * min(times),
            "tokens/s": round(tokens / median),
        }
        rows.append({**row, "against the first": base / median, "share of matmul rate": share})
        print(row | {"against the first": f"{base / median:.3f}", "share": f"{share:.3f}"}, flush=True)
    where = surroundings(options.device) | {"cpus": os.cpu_count()}
    settings = f"{options.model}, {tokens} tokens a step, compile {options.compile}, {options.rounds} rounds."
    write("throughput", where, {settings: rows}, notes=(__doc__ or "").split("\n\n")[2])


if __name__ == "__main__":
    main()
