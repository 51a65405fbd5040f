"""What a step costs: every type, backend and precision against torch's optimizers on GPT-2's tensors.

    python benchmarks/step.py                           # GPT-2 small on the CPU
    python benchmarks/step.py --model gpt2-large --rows "adamw|lion" --repeats 5
    python benchmarks/step.py --model gpt2-xl --parameters bf16 --rows "8-bit remainder" --repeats 5
    python benchmarks/step.py --scaling                 # cost against model size and against number of tensors
    python benchmarks/step.py --device cuda --model gpt2-xl

Each row is timed interleaved with two baselines, fused AdamW and `clip_grad_norm_` + fused AdamW, on the same
parameters; optimizers that take many times as long also with MARS-AdamW. A step is `step()` and `zero_grad()`: both
must be rid of one gradient buffer. Gradients are new tensors each time, as autograd makes them.

The C library either keeps freed memory, as `mars train` sets it, or gives it back to the system, as in a program that
sets nothing. Steps that make large temporary tensors then pay for each page, so they are timed both ways; for the
others it is chance whose gradients are given back, so they are timed with memory kept alone.
"""

from __future__ import annotations

import argparse
import ctypes
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from measuring import cell, copy_bandwidth, interleaved, surroundings, synchronize, write
from torch import Tensor, nn
from torch.optim import Optimizer

from mars_lab.training.allocator import keep_freed_memory
from mars_optim import MARS

GPT2 = {"gpt2-small": (12, 768), "gpt2-medium": (24, 1024), "gpt2-large": (36, 1280), "gpt2-xl": (48, 1600)}
VOCABULARY, CONTEXT = 50257, 1024


def gpt2_shapes(layers: int, width: int, vocabulary: int = VOCABULARY) -> list[tuple[int, ...]]:
    """The tensors of a GPT-2: embeddings, then norms, attention and MLP with biases in each layer."""
    matrices = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    layer = [shape for rows, columns in matrices for shape in ((rows, columns), (rows,))] + [(width,)] * 4
    return [(vocabulary, width), (CONTEXT, width), *(layer * layers), (width,), (width,)]


@dataclass(frozen=True)
class Row:
    """One thing to time: how to make the optimizer, what to do before its step, and the bytes that must move."""

    make: Callable[[list[nn.Parameter]], Optimizer]
    bytes_moved: float | None = None  # a parameter: each operand read and written once
    dtype: torch.dtype = torch.float32
    slow: bool = False  # makes temporary tensors: fewer rounds, both allocators, and MARS-AdamW beside it
    gradient: float = 2e-3  # as a multiple of the weights; see the notes


def hidden_and_rest(parameters: list[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    hidden = [p for p in parameters[2:] if p.ndim == 2]
    return hidden, [p for p in parameters if all(p is not q for q in hidden)]


def mars(mars_type: str = "adamw", **options: Any) -> Callable[[list[nn.Parameter]], Optimizer]:
    def make(parameters: list[nn.Parameter]) -> Optimizer:
        if mars_type in ("adamw", "lion"):
            return MARS(parameters, lr=1e-4, mars_type=mars_type, **options)
        hidden, rest = hidden_and_rest(parameters)
        groups = [{"params": hidden, "mars_type": mars_type}, {"params": rest}]
        return MARS(groups, lr=1e-4, polar_dtype=torch.bfloat16, **options)

    return make


class MuonAndAdamW(Optimizer):
    """torch.optim.Muon for the hidden matrices, fused AdamW for the rest: what people train GPT-2 with."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {})
        hidden, rest = hidden_and_rest(parameters)
        self.both = [torch.optim.Muon(hidden, lr=1e-4), torch.optim.AdamW(rest, lr=1e-4, fused=True)]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for optimizer in self.both:
            optimizer.step()


class CompiledMARS(Optimizer):
    """torch.compile of MARS-AdamW's lines, one tensor at a time, on every tensor: what own kernels have to beat."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {})
        self._update = torch.compile(_mars_adamw_, dynamic=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            for name in ("exp_avg", "exp_avg_sq", "prev_grad"):
                if name not in state:
                    state[name] = torch.zeros_like(p)
            moments = (state[name].view(-1) for name in ("exp_avg", "exp_avg_sq"))
            self._update(p.view(-1), p.grad.view(-1), state["prev_grad"].view(-1), *moments)
            state["prev_grad"] = p.grad


def _mars_adamw_(x: Tensor, g: Tensor, prev: Tensor, m: Tensor, v: Tensor) -> None:
    c = g + 0.025 * 19 * (g - prev)
    c = c / torch.linalg.vector_norm(c).clamp(min=1.0)
    m.copy_(0.95 * m + 0.05 * c)
    v.copy_(0.99 * v + 0.01 * c * c)
    x.copy_(x - 1e-4 * m / (v.sqrt() + 1e-8))


def adamw(**options: Any) -> Callable[[list[nn.Parameter]], Optimizer]:
    return lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, **options)


def rows(device: str) -> dict[str, Row]:
    low = {"exp_avg": "bf16", "exp_avg_sq": "bf16", "prev_grad": "bf16"}
    moments = {"exp_avg": "bf16", "exp_avg_sq": "bf16"}
    half = {"dtype": torch.bfloat16}
    return {
        "torch AdamW, single": Row(adamw(foreach=False), bytes_moved=28, slow=True),
        "torch AdamW, foreach": Row(adamw(foreach=True), bytes_moved=28, slow=True),
        "mars-adamw": Row(mars(), bytes_moved=32),
        "mars-adamw, gradients long enough to be clipped": Row(mars(), bytes_moved=32, gradient=0.1),
        "mars-lion, gradients long enough to be clipped": Row(mars("lion"), bytes_moved=24, gradient=0.1),
        "mars-adamw, gradient copied": Row(mars(donate_grads=False), bytes_moved=36),
        "mars-adamw, max_grad_norm": Row(mars(max_grad_norm=1.0), bytes_moved=40),
        "mars-adamw, unclipped": Row(mars(clip_norm=None), bytes_moved=32),
        "mars-adamw, bf16 state": Row(mars(state_precision=low), bytes_moved=24),
        "mars-adamw, bf16 state, unclipped": Row(mars(state_precision=low, clip_norm=None), bytes_moved=24),
        "mars-adamw, bf16 moments": Row(mars(state_precision=moments), bytes_moved=24),
        "mars-adamw, 8-bit state": Row(mars(state_precision="8bit"), bytes_moved=18.2),
        "mars-adamw, bf16 parameters": Row(mars(), bytes_moved=24, **half),
        "mars-adamw, bf16 parameters + 8-bit remainder, 8-bit state": Row(
            mars(state_precision="8bit", param_rounding="remainder8"), bytes_moved=14.2, **half
        ),
        "mars-adamw, exact": Row(mars(is_approx=False), bytes_moved=36),
        "mars-lion": Row(mars("lion"), bytes_moved=24),
        "mars-lion, unclipped": Row(mars("lion", clip_norm=None), bytes_moved=20),
        "mars-lion, unclipped, bf16 state": Row(mars("lion", clip_norm=None, state_precision=low), bytes_moved=16),
        "torch Muon + AdamW": Row(MuonAndAdamW, slow=True),
        "mars-shampoo": Row(mars("shampoo"), slow=True),
        "mars-m": Row(mars("m"), slow=True),
        "mars-m, Polar Express": Row(mars("m", polar_coefficients="polar-express"), slow=True),
        "mars-m, unclipped": Row(mars("m", clip_norm=None), slow=True),
        "mars-adamw, reference": Row(mars(foreach=False), slow=True),
        "mars-adamw, foreach": Row(mars(foreach=True), slow=True),
        "torch.compile of MARS-AdamW": Row(CompiledMARS, bytes_moved=32, slow=True),
        "mars-lion, reference": Row(mars("lion", foreach=False), slow=True),
        **_peers(device),
    }


def _peers(device: str) -> dict[str, Row]:
    """Other people's optimizers, where they are installed."""
    peers: dict[str, Row] = {}
    if find_spec("pytorch_optimizer") is not None:
        import pytorch_optimizer  # type: ignore[import-not-found]

        peers["pytorch_optimizer MARS"] = Row(lambda parameters: pytorch_optimizer.MARS(parameters, lr=1e-4), slow=True)
    else:
        print("pytorch_optimizer is not installed: its row is left out")
    if device == "cuda" and find_spec("flashoptim") is not None:
        from flashoptim import FlashAdamW  # type: ignore[import-not-found]

        peers["flashoptim AdamW"] = Row(lambda parameters: FlashAdamW(parameters, lr=1e-4), dtype=torch.bfloat16)
    elif device == "cuda":
        print("flashoptim is not installed: its row is left out")
    return peers


def share_moments(optimizer: Optimizer, adamw: Optimizer) -> None:
    """Give a fresh MARS-AdamW fused AdamW's moments: both are timed in turns, and no values matter.

    So 20 bytes a parameter do, gradients included, where two optimizers by themselves take 28.
    """
    if not isinstance(optimizer, MARS) or optimizer.defaults["mars_type"] != "adamw":
        return
    for group in optimizer.param_groups:
        for p in group["params"]:
            if group["state_precision"] == "fp32" and p in adamw.state and p.dtype == torch.float32:
                optimizer.state[p].update({name: adamw.state[p][name] for name in ("exp_avg", "exp_avg_sq")})


class Bench:
    """The parameters of one model, and the two baselines on them."""

    def __init__(self, shapes: list[tuple[int, ...]], device: str, dtype: torch.dtype = torch.float32) -> None:
        self.device, self.block = device, torch.ones(1 << 27, device=device)
        generator = torch.Generator(device).manual_seed(0)
        values = [torch.empty(s, device=device, dtype=dtype).normal_(0, 0.02, generator=generator) for s in shapes]
        self.dtype = dtype
        self.parameters = [nn.Parameter(value) for value in values]
        self.adamw = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)
        self.num_parameters = sum(p.numel() for p in self.parameters)

    @cached_property
    def mars_adamw(self) -> Optimizer:
        """MARS-AdamW on the same parameters, with fused AdamW's moments."""
        optimizer = mars()(self.parameters)
        share_moments(optimizer, self.adamw)
        return optimizer

    def measure(self, name: str, row: Row, repeats: int) -> dict[str, Any]:
        """Return a row of the table."""
        own = self.parameters
        if row.dtype != self.dtype:
            own = [nn.Parameter(p.detach().to(row.dtype)) for p in self.parameters]
        optimizer = row.make(own)
        if not self.adamw.state:
            fresh_gradients(self.parameters, row.gradient)
            take_step(self.adamw, self.parameters)
        share_moments(optimizer, self.adamw)

        def prepare(which: str) -> None:
            if which == "copy":
                return  # gradients that stay would take the place where the next ones go
            parameters = own if which == "it" else self.parameters
            if which == "it" and isinstance(optimizer, MARS) and not optimizer.param_groups[0]["is_approx"]:
                with optimizer.previous_params():
                    fresh_gradients(parameters, row.gradient)
            fresh_gradients(parameters, row.gradient)

        runs: dict[str, Callable[[], None]] = {
            "AdamW fused": lambda: take_step(self.adamw, self.parameters),
            "clip + AdamW fused": lambda: take_step(self.adamw, self.parameters, clip=True),
            "copy": lambda: self.block.mul_(1.0),
            "it": lambda: take_step(optimizer, own),
        }
        if row.slow:
            runs["MARS-AdamW"] = lambda: take_step(self.mars_adamw, self.parameters)
        interleaved({"it": runs["it"]}, 1, prepare=prepare, device=self.device, warm_up=0)  # creates the state
        prepare("it")
        in_use = self._reset_peak()
        runs["it"]()
        peak = self._peak() - in_use
        num_rounds = max(3, repeats // 4) if row.slow else repeats
        times = interleaved(runs, num_rounds, prepare=prepare, device=self.device)
        tensors = [t for state in _states(optimizer) for t in state.values() if isinstance(t, Tensor) and t.ndim > 0]
        it, adamw, clipped = (times[key] for key in ("it", "AdamW fused", "clip + AdamW fused"))
        result: dict[str, Any] = {
            "step": name,
            "ms": it,
            "AdamW fused ms": adamw,
            "clip + AdamW fused ms": clipped,
            "/ AdamW": it / adamw,
            "/ (clip + AdamW)": it / clipped,
            "/ MARS-AdamW": it / times["MARS-AdamW"] if row.slow else "",
            "bytes moved": "" if row.bytes_moved is None else row.bytes_moved,
            "of copy rate": "",
            "state bytes": sum(t.nbytes for t in tensors) / self.num_parameters,
            "peak MB": round(peak / 1e6),
        }
        if row.bytes_moved is not None:
            moved = row.bytes_moved * self.num_parameters / (2 * self.block.nbytes)
            result["of copy rate"] = moved * (times["copy"] / it).median
        print("  ".join(f"{key}: {cell(value)}" for key, value in result.items()), flush=True)
        return result

    def _reset_peak(self) -> int:
        """Start a new measurement of the peak; return the bytes in use."""
        synchronize(self.device)
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator keeps is not in use
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")

    def _peak(self) -> int:
        synchronize(self.device)
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else _status("VmHWM")


def fresh_gradients(parameters: list[nn.Parameter], size: float) -> None:
    for p in parameters:
        p.grad = p.detach() * size


def take_step(optimizer: Optimizer, parameters: list[nn.Parameter], *, clip: bool = False) -> None:
    if clip:
        nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    for p in parameters:
        p.grad = None


def _status(name: str) -> int:
    match = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def _states(optimizer: Optimizer) -> Iterator[dict[str, Any]]:
    for part in getattr(optimizer, "both", [optimizer]):
        yield from part.state.values()


def by_size(device: str, repeats: int, largest: int) -> list[dict[str, Any]]:
    """GPT-2's proportions from one million parameters up."""
    sizes = {1: (2, 64, 8192), 10: (4, 256, 16384), 50: (8, 512, 32768), 124: (12, 768, 50257)}
    sizes |= {355: (24, 1024, 50257), 774: (36, 1280, 50257), 1000: (42, 1360, 50257)}
    result: list[dict[str, Any]] = []
    for millions, model in sizes.items():
        if millions > largest:
            print(f"{millions}M parameters: left out, more than --largest {largest}")
            continue
        bench = Bench(gpt2_shapes(*model), device)
        for name in ("mars-adamw", "mars-adamw, 8-bit state"):
            made = bench.measure(name, rows(device)[name], max(5, repeats * 20 // (20 + millions)))
            result.append({"parameters": bench.num_parameters, **made})
    return result


def by_count(device: str, repeats: int) -> list[dict[str, Any]]:
    """Sixteen million parameters in more and more tensors."""
    result: list[dict[str, Any]] = []
    for count in (16, 160, 1600, 16000):
        bench = Bench([(16, 1_000_000 // count)] * count, device)
        made = bench.measure("mars-adamw", rows(device)["mars-adamw"], repeats)
        result.append({"tensors": count, **made})
    return result


def plot(table: list[dict[str, Any]], path: Path, title: str) -> None:
    """Bars of time relative to fused AdamW, logarithmic."""
    import matplotlib.pyplot as plt

    names, ratios = [row["step"] for row in table][::-1], [row["/ AdamW"].median for row in table][::-1]
    figure, axes = plt.subplots(figsize=(8, 0.32 * len(names) + 1), layout="constrained")
    axes.barh(names, ratios, color=["#0072B2" if name.startswith("mars") else "#999999" for name in names])
    for i, ratio in enumerate(ratios):
        on_white = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # the line ends there
        axes.text(ratio * 1.04, i, f"{ratio:.3g}", va="center", fontsize=8, bbox=on_white)
    axes.axvline(1, color="black", linewidth=0.8, zorder=2)
    axes.set(xscale="log", xlabel="time of a step / torch AdamW fused", title=title)
    axes.margins(x=0.2, y=0.01)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=GPT2, default="gpt2-small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--parameters", choices=("fp32", "bf16"), default="fp32", help="of the model and the baselines")
    parser.add_argument("--rows", type=_pattern, help="a regular expression: only rows whose name it finds")
    parser.add_argument("--name", help="of the table, beside the model's; with --rows some-rows unless said otherwise")
    parser.add_argument("--repeats", type=_count, default=21)
    parser.add_argument("--scaling", action="store_true", help="cost against model size and number of tensors instead")
    parser.add_argument("--largest", type=_count, default=1000, help="with --scaling: millions of parameters at most")
    arguments = parser.parse_args()
    device, repeats = arguments.device, arguments.repeats
    if arguments.scaling:
        if arguments.rows or arguments.model != "gpt2-small" or arguments.parameters != "fp32":
            parser.error("--scaling has rows and models of its own; leave out --rows, --model and --parameters")
        keep_freed_memory()
        sections = {
            "Model size": by_size(device, repeats, arguments.largest),
            "Number of tensors (16M parameters)": by_count(device, repeats),
        }
        print(write("step-scaling", where(device), sections, NOTES))
        return
    dtype = torch.float32 if arguments.parameters == "fp32" else torch.bfloat16
    known = {name: row for name, row in rows(device).items() if dtype in (torch.float32, row.dtype)}
    chosen = {name: row for name, row in known.items() if arguments.rows is None or arguments.rows.search(name)}
    if not chosen:
        names = "\n  ".join(known)
        parser.error(f"--rows {arguments.rows.pattern!r} finds none of\n  {names}")
    bench = Bench(gpt2_shapes(*GPT2[arguments.model]), device, dtype)
    called = arguments.name or ("" if arguments.rows is None else "some-rows")
    parts = ["step", arguments.model, "" if dtype == torch.float32 else "bf16-parameters", called]
    name = "-".join(part for part in parts if part)
    table: list[dict[str, Any]] = []
    about = where(device)
    try:
        measure_all(bench, chosen, repeats, table)
    except KeyboardInterrupt:
        if table:
            print(write(f"{name}-interrupted", about, {arguments.model: table}, NOTES))
        raise
    path = write(name, about, {arguments.model: table}, NOTES)
    print(path)
    plot(table, path.with_suffix(".svg"), f"{arguments.model}, {about['device']}")


def measure_all(bench: Bench, chosen: dict[str, Row], repeats: int, table: list[dict[str, Any]]) -> None:
    """Add these rows to the table: first slow ones with freed memory given back, then all with memory kept."""
    for name, row in chosen.items():
        if row.slow and bench.device == "cpu":
            table.append(bench.measure(f"{name}; memory given back", row, repeats))
    keep_freed_memory()  # from here on: it can't be taken back
    table.extend(bench.measure(name, row, repeats) for name, row in chosen.items())


def where(device: str) -> dict[str, Any]:
    return surroundings(device) | {"copy GB/s": round(copy_bandwidth(device) / 1e9, 1)}


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a regular expression: {error}") from error


def _count(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


NOTES = (
    "Median (quartiles) in milliseconds of `step()` and freeing the gradients, each row interleaved with the "
    "baselines on the same parameters; quotients are taken round by round. The C library keeps freed memory, as in "
    "`mars train`, but in rows that say `memory given back`, as in a program that sets nothing. `bytes moved`: each "
    "operand of a parameter read and written once; `of copy rate`: those bytes a second over what a pass in place "
    "over 512 MB moves in the same round. `state bytes`: optimizer state a parameter. `peak MB`: memory above what is "
    "in use before the step. Gradients are 0.002 times the weights, on GPT-2 small of global norm 0.45, as late in "
    "training: then norms tell that nothing is clipped. Where they are longer, norms take g and g' from memory once "
    "more. Made by `benchmarks/step.py`."
)

if __name__ == "__main__":
    main()
