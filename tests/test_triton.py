"""The Triton backend without a GPU: its choice, its kernels interpreted and compiled, each in a process of its own.

Under the interpreter every kernel of a process is interpreted, so that no other test may share it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from mars_optim import MARS, backends
from mars_optim.backends import triton

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="needs the package triton, which is Linux's alone"
)

# Compiled for the machine the kernels are for, without it. All formats that differ in their code, at least once.
COMPILE = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mars_optim.backends import triton_kernels as k

def ptx(kernel, **constants):
    types = {"found_inf": "*fp32", "blocks": "*i32", "table": "*i64", "records": "*fp32", "partial": "*fp64",
             "sums": "*fp64", "count": "i32"}
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i64") for n in names}
    source = ASTSource(fn=kernel, signature=signature,
                       constexprs={(names.index(n),): value for n, value in constants.items()})
    options = {"num_warps": k.NUM_WARPS, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]

plain = dict(T=tl.float32, OP=1, X=tl.float32, G=tl.float32, PREV=tl.float32, M=tl.float32, V=tl.float32, OUT=None,
             ROUNDING=0, HAS_PREV=True, KEEPS=True, ONE_BUFFER=False, AMSGRAD=False, DRAWS=False, SKIPS=True,
             ALIGNED=True)
small = dict(X=tl.bfloat16, G=tl.bfloat16, PREV=tl.int8, M=tl.int8, V=tl.uint8, ROUNDING=4, DRAWS=True)
double = {name: tl.float64 for name in ("T", "X", "G", "PREV", "M", "V")}
text = ptx(k.update, **plain)
assert text.count("ld.global.v4.b32") == 5, "x, g, g', m and v are read 16 bytes at a time"
assert text.count("st.global.v4.b32") == 4, "x, m, v and g' are written 16 bytes at a time"
assert "fma.rn.f32" not in text, "rounds as the other backends do"
assert "v4" not in ptx(k.update, **{**plain, "ALIGNED": False, "KEEPS": False})
ptx(k.update, **{**plain, **small})
ptx(k.update, **{**plain, **double, "AMSGRAD": True})
ptx(k.update, **{**plain, "OP": 2, "X": tl.float16, "G": tl.float16, "ROUNDING": 1, "ONE_BUFFER": True})
ptx(k.update, **{**plain, "OP": 3, "OUT": tl.float32, "M": tl.bfloat16, "DRAWS": True})
for rounding in (2, 3, 4):
    for half in (tl.bfloat16, tl.float16):
        ptx(k.descend, T=tl.float32, X=half, OUT=tl.float32, ROUNDING=rounding, SKIPS=False, ALIGNED=True)
reads = dict(KINDS=0, HAS_PREV=True, T=tl.float32, G=tl.float32, PREV=tl.float32, ALIGNED=True)
assert ptx(k.measure, PRODUCTS=False, **reads).count("ld.global.v4.b32") == 2
ptx(k.measure, PRODUCTS=True, **{**reads, "PREV": tl.int8})
ptx(k.add_products)
ptx(k.prepare, KINDS=0, OP=1, CLIPS=True, STEP=None)
ptx(k.prepare, KINDS=0, OP=4, CLIPS=False, STEP=tl.float32)
"""


def run(*arguments: str, **environment: str) -> None:
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=HERE.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-10000:] + result.stderr[-10000:]


@needs_triton
@pytest.mark.slow
def test_interpreted() -> None:
    """See interpreted_triton.py."""
    run("-m", "pytest", "-p", "no:cacheprovider", "tests/interpreted_triton.py", TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.slow
def test_compiled_for_hopper(tmp_path: Path) -> None:
    run("-c", COMPILE, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what is said without a CUDA device")
def test_without_a_device_fused_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(triton.TritonUnavailable, match="need a CUDA device and torch sees none; install a CUDA build"):
        triton.require()
    with pytest.raises(RuntimeError, match=r"fused=True: the Triton kernels need a CUDA device .*; or use fused=None"):
        backends._fused({"cuda"}, [], required=True)
    backends._say_once.cache_clear()
    assert backends._fused({"cuda"}, [], required=False) is None
    assert backends._fused({"cuda"}, [], required=False) is None
    assert caplog.text.count("the Triton kernels need a CUDA device") == 1


def test_other_devices_have_no_fused_kernels() -> None:
    with pytest.raises(RuntimeError, match="there are no fused kernels for parameters on meta"):
        backends._fused({"meta"}, [], required=True)
    optimizer = MARS([nn.Parameter(torch.ones(2, 2, device="meta"))], foreach=None)
    assert backends.select(optimizer.param_groups[0]) is backends.foreach
