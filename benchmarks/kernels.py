"""The native kernels by themselves, without what Python does around them, paired with torch's fused AdamW.

    python benchmarks/kernels.py
    python benchmarks/kernels.py --rows "adamw" --against OTHER/_native.so   # this build and another, round by round

What a step costs beyond this is in `benchmarks/step.py`. Nothing is written: this is for work on the kernels.
"""

from __future__ import annotations

import argparse
import math
import re
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from measuring import copy_bandwidth, interleaved
from step import GPT2, gpt2_shapes
from torch import Tensor

from mars_lab.training.allocator import keep_freed_memory
from mars_optim.backends.native_library import WINDOW, Call, Flag, Format, Library, Op, library_at, load, pack

CLIP_NORM = 1.0
FORMATS = {torch.float32: Format.F32, torch.bfloat16: Format.BF16, torch.int8: Format.Q8, torch.uint8: Format.Q8}


@dataclass(frozen=True)
class Kernel:
    """One call over all tensors: what it does, how the state is stored, and the bytes a parameter that must move."""

    op: Op
    bytes_moved: float
    state: str = "fp32"
    clips: bool = True
    usual: bool = True  # the last gradient was like this one


KERNELS = {
    "adamw": Kernel(Op.ADAMW, 32),
    "adamw, unclipped": Kernel(Op.ADAMW, 32, clips=False),
    "adamw, nothing known of the last gradient": Kernel(Op.ADAMW, 40, usual=False),
    "adamw, bf16 state": Kernel(Op.ADAMW, 24, "bf16"),
    "adamw, bf16 state, unclipped": Kernel(Op.ADAMW, 24, "bf16", clips=False),
    "adamw, 8-bit state": Kernel(Op.ADAMW, 18.2, "8bit"),
    "lion": Kernel(Op.LION, 24),
    "lion, unclipped": Kernel(Op.LION, 24, clips=False),
    "products of g alone": Kernel(Op.PRODUCTS, 4),
}


class Tensors:
    """A model's weights, gradients and state, shared by all kernels."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        generator = torch.Generator().manual_seed(0)

        def drawn(size: float) -> list[Tensor]:
            return [torch.empty(math.prod(shape)).normal_(0, size, generator=generator) for shape in shapes]

        self.x, self.g = drawn(0.02), drawn(4e-5)
        self.spares: list[Tensor] = []
        self.state: dict[str, dict[str, list[Tensor]]] = {
            "fp32": {"prev": drawn(4e-5), "m": drawn(1e-5), "v": [m.square() for m in drawn(4e-5)]}
        }

    def of(self, precision: str) -> dict[str, list[Tensor]]:
        """Return prev, m and v, and their scales, stored so."""
        if precision not in self.state:
            plain = self.state["fp32"]
            if precision == "bf16":
                self.state[precision] = {name: [t.bfloat16() for t in of] for name, of in plain.items()}
            else:
                codes = {
                    name: [torch.ones_like(t, dtype=torch.uint8 if name == "v" else torch.int8) for t in of]
                    for name, of in plain.items()
                }
                scales = {
                    f"{name}_scale": [torch.full((-(-t.numel() // 128),), 1e-4) for t in of]
                    for name, of in codes.items()
                }
                self.state[precision] = codes | scales
        return self.state[precision]

    def next_of(self, prev: list[Tensor]) -> list[int]:
        """Return where bf16 goes that is not written over: to the place of a tensor of its size, as in `Spares`."""
        places: list[int] = []
        last: dict[int, int] = {}
        for t in reversed(prev):
            if t.dtype != torch.bfloat16 or t.numel() < WINDOW:
                places.append(t.data_ptr())
                continue
            spare = last.get(t.numel())
            if spare is None:
                self.spares.append(torch.empty_like(t))
                spare = self.spares[-1].data_ptr()
            places.append(spare)
            last[t.numel()] = t.data_ptr()
        return places[::-1]


def runner(kernel: Kernel, tensors: Tensors, library: Library) -> Callable[[], None]:
    """Return what runs `kernel` once over all tensors."""
    state, count = tensors.of(kernel.state), len(tensors.x)
    measures = kernel.op == Op.PRODUCTS

    def addresses(name: str) -> array[int]:
        of = {"x": tensors.x, "g": tensors.g}.get(name, state.get(name))
        return array("Q", [t.data_ptr() for t in of] if of is not None else [0] * count)

    def numbers(value: float) -> array[float]:
        return array("d", [value]) * count

    absent = addresses("absent")
    prev = absent if measures else addresses("prev")
    prev_scale, takes_over = addresses("prev_scale"), kernel.state == "fp32" or measures
    next_grads = absent if takes_over else array("Q", tensors.next_of(state["prev"]))
    norms = array("d", [g.norm().item() for g in tensors.g]) if kernel.usual else numbers(math.inf)
    columns = [
        *(array("Q", [t.numel() for t in tensors.x]), addresses("x"), absent, addresses("g"), prev, prev_scale),
        *(next_grads, absent if takes_over else prev_scale),
        *(addresses("m"), addresses("m_scale"), addresses("v"), addresses("v_scale"), absent, absent, absent),
        array("Q", [i * 0x9E3779B97F4A7C15 % 2**64 for i in range(count)]),
        # a, b, ratio, we, wg, decay, step_size, inv_sqrt_bias2
        *map(numbers, (1.0, 0.475, 1.0, 1.0, 0.0, 1 - 1e-6, 1e-6, 1.0, math.inf)),
        norms,
    ]
    records = pack(columns)
    sums = torch.zeros(count, 3, dtype=torch.float64)
    formats = {name: FORMATS[state[name][0].dtype] for name in ("prev", "m", "v")}
    call = Call(
        op=kernel.op,
        prev_format=formats["prev"],
        m_format=formats["m"],
        v_format=formats["v"],
        flags=0 if kernel.state == "fp32" else Flag.STOCHASTIC_M | Flag.STOCHASTIC_V,
        num_threads=torch.get_num_threads(),
        beta1=0.95,
        beta2=0.99,
        eps=1e-8,
        clip_norm=CLIP_NORM if kernel.clips and not measures else 0.0,
    )
    return lambda: library.run(call, records, count, sums.data_ptr())


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=GPT2, default="gpt2-small")
    parser.add_argument("--rows", default="", help="a regular expression: only kernels whose name it finds")
    parser.add_argument("--against", type=Path, help="another build of the library, to time beside this one")
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    if arguments.against is not None and not arguments.against.is_file():
        parser.error(f"--against {arguments.against}: there is no such file")
    keep_freed_memory()
    libraries = {"": load()}
    if arguments.against is not None:
        libraries[" (other)"] = library_at(arguments.against)
    chosen = {name: kernel for name, kernel in KERNELS.items() if re.search(arguments.rows, name)}
    if not chosen:
        parser.error(f"--rows {arguments.rows!r} finds none of: {', '.join(KERNELS)}")
    tensors = Tensors(gpt2_shapes(*GPT2[arguments.model]))
    parameters = [torch.nn.Parameter(x) for x in tensors.x]
    for p, g in zip(parameters, tensors.g, strict=True):
        p.grad = g
    adamw = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
    num_parameters = sum(x.numel() for x in tensors.x)
    print(f"copy in place: {copy_bandwidth('cpu') / 1e9:.3g} GB/s; {load().isa.name}; ms: median (quartiles)")
    for name, kernel in chosen.items():
        runs: dict[str, Callable[[], None]] = {"AdamW fused": lambda: adamw.step()}
        runs |= {name + which: runner(kernel, tensors, library) for which, library in libraries.items()}
        times = interleaved(runs, arguments.repeats)
        print(f"AdamW fused {times['AdamW fused']}", end="")
        for which in libraries:
            it = times[name + which]
            rate = kernel.bytes_moved * num_parameters / it.median * 1e3 / 1e9
            print(f"; {name + which} {it}, {it / times['AdamW fused']} of it, {rate:.3g} GB/s", end="")
        print(f"; this / other {times[name] / times[name + ' (other)']}" if arguments.against else "", flush=True)


if __name__ == "__main__":
    main()
