"""The Triton kernels under Triton's interpreter, on CPU tensors. `test_triton.py` runs this file, in a process of its
own: under TRITON_INTERPRET=1 every kernel of the process is interpreted.

    TRITON_INTERPRET=1 python -m pytest tests/interpreted_triton.py

The interpreter runs programs one after another and knows no alignment, no races and no registers: those are for
`test_gpu.py`, and for the compiler in `test_triton.py`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mars_optim import MARS, backends
from mars_optim.backends import foreach, reference, triton, triton_tables
from mars_optim.state import ROUNDINGS, decode_weight
from problems import BACKENDS
from test_trajectories import compare

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1: these tests have no GPU"

# numpy, which the interpreter computes with, warns of overflows and divisions by zero that the tests provoke.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SVD = {"polar_method": "svd", "polar_dtype": torch.float64}
BACKENDS["triton"] = {}
SIZES = [(33, 41), (129,), (0, 3), (1, 1)]


@pytest.fixture(autouse=True)
def triton_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """All groups without a say of their own take the kernels."""
    monkeypatch.setattr(
        backends, "select", lambda group: {None: triton, False: reference, True: foreach}[group["foreach"]]
    )


def make(shapes: Sequence[tuple[int, ...]] = SIZES, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter((torch.randn(s, generator=generator) / 2).to(dtype)) for s in shapes]


def give_gradients(parameters: Sequence[Tensor], t: int) -> None:
    generator = torch.Generator().manual_seed(100 + t)
    for p in parameters:
        p.grad = (torch.randn(p.shape, generator=generator) * (0.02 if t % 2 else 0.2)).to(p.dtype)


def pair(num_steps: int, parameters: list[nn.Parameter], **options: Any) -> tuple[MARS, MARS, list[nn.Parameter]]:
    """Some steps by the kernels and by the reference."""
    twins = [nn.Parameter(p.detach().clone()) for p in parameters]
    options = {"lr": 1e-2, "gamma": 0.2, "weight_decay": 0.1, **SVD, **options}
    ours, theirs = MARS(parameters, **options), MARS(twins, foreach=False, **options)
    for t in range(num_steps):
        for optimizer, group in ((ours, parameters), (theirs, twins)):
            give_gradients(group, t)
            optimizer.step()
    return ours, theirs, twins


def assert_same(ours: MARS, theirs: MARS, ps: Sequence[Tensor], qs: Sequence[Tensor], *, share: float = 0.0) -> None:
    """Values within fp32 rounding; of what is rounded to few bits, a share may fall to the other side."""
    for p, q in zip(ps, qs, strict=True):
        entries, expected = ({**o.state[x], "weight": x.detach()} for o, x in ((ours, p), (theirs, q)))
        assert {n: t.dtype for n, t in entries.items()} == {n: t.dtype for n, t in expected.items()}
        for each in (entries, expected):  # a remainder's last bits are those of fp32: what counts is the weight
            each["whole"] = decode_weight(each["weight"], each.pop("param_remainder", None))
        for name, value in entries.items():
            if value.is_floating_point() and value.itemsize > 2:
                rounded = name == "whole" and share > 0
                rtol, atol = (3e-2, 1e-5) if rounded else (1e-4, 2e-6)
                torch.testing.assert_close(value, expected[name], rtol=rtol, atol=atol)
            elif value.numel():
                different = (value.float() != expected[name].float()).sum()
                assert different <= 1 + share * value.numel(), name


# ------------------------------------------------------------------ the oracle, float64

NAMES = ("scalar", "strided_vector", "strided_conv", "empty_matrix", "wide")
MATRICES = ("strided_matrix", "empty_matrix", "wide")
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("approx", "adamw", {}),
    ("approx", "adamw", {"max_grad_norm": 0.5, "amsgrad": True, "weight_decay": 0.1}),
    ("approx", "adamw", {"first_step": "zero", "optimize_1d": True, "clip_norm": None}),
    ("exact", "adamw", {"gamma": torch.tensor(1.0, dtype=torch.float64), "max_grad_norm": 0.5}),
    ("approx", "lion", {"clip_norm": None, "maximize": True}),
    ("exact", "lion", {"optimize_1d": True}),
    ("approx", "m", {"clip_norm": None, "weight_decay": 0.1}),
    ("approx", "m", {"max_grad_norm": 0.5}),
]


@pytest.mark.parametrize(("mode", "mars_type", "options"), CASES, ids=str)
def test_trajectories(mode: str, mars_type: str, options: dict[str, Any]) -> None:
    """All shapes in one batch, strided and empty ones among them."""
    names = MATRICES if mars_type == "m" else NAMES
    expected = {**options, "gamma": float(options.get("gamma", 0.1))}
    compare("triton", mode, mars_type, names, {"gamma": 0.1, **options}, expected, num_steps=3)


@pytest.mark.parametrize(
    ("mars_type", "options"),
    [("adamw", {}), ("adamw", {"max_grad_norm": 0.5}), ("lion", {"clip_norm": None}), ("m", {"clip_norm": None})],
    ids=str,
)
def test_capturable(mars_type: str, options: dict[str, Any]) -> None:
    """Steps, flags and keys as tensors. The flag and the previous coefficient are float32."""
    library = {**options, "capturable": True, "lr": torch.tensor(2e-2, dtype=torch.float64), "gamma": 0.2}
    expected = {**options, "lr": 2e-2, "gamma": 0.2}
    compare("triton", "approx", mars_type, ("wide", "vector"), library, expected, atol=1e-6, num_steps=3)


@pytest.mark.parametrize("mars_type", ["adamw", "m"])
def test_tensors_whose_step_counts_differ(mars_type: str) -> None:
    compare(
        "triton",
        "approx",
        mars_type,
        ("wide", "tall"),
        {"gamma": 0.2},
        present=lambda t: [t % 2 == 0, t > 0],
        num_steps=5,
    )


# ------------------------------------------------------------------ formats and rounding, against the reference

FORMATS: list[dict[str, Any]] = [
    {"dtype": torch.float32, "state_precision": "fp32"},
    {"dtype": torch.float32, "state_precision": "bf16"},
    {"dtype": torch.float32, "state_precision": "8bit"},
    {"dtype": torch.float32, "state_precision": {"exp_avg": "bf16", "exp_avg_sq": "8bit", "prev_grad": "8bit"}},
    {"dtype": torch.float64, "state_precision": "bf16"},
    *(
        {"dtype": dtype, "state_precision": precision, "param_rounding": rounding}
        for dtype in (torch.bfloat16, torch.float16)
        for precision, rounding in [
            ("fp32", "nearest"),
            ("8bit", "stochastic"),
            ("bf16", "kahan"),
            ("8bit", "remainder8"),
            ("fp32", "remainder16"),
        ]
    ),
]


@pytest.mark.parametrize("formats", FORMATS, ids=lambda f: "-".join(str(v) for v in f.values()))
@pytest.mark.parametrize(
    ("mars_type", "options"),
    [("adamw", {"amsgrad": True, "capturable": True}), ("lion", {"clip_norm": None, "optimize_1d": True})],
    ids=str,
)
def test_formats(mars_type: str, options: dict[str, Any], formats: dict[str, Any]) -> None:
    formats = dict(formats)
    parameters = make(dtype=formats.pop("dtype"))
    ours, theirs, twins = pair(2, parameters, mars_type=mars_type, **options, **formats)
    assert_same(ours, theirs, parameters, twins, share=0.03)


@pytest.mark.parametrize("formats", [FORMATS[0], FORMATS[2], FORMATS[8], FORMATS[9]], ids=str)
def test_formats_of_matrices(formats: dict[str, Any]) -> None:
    formats = dict(formats)
    parameters = make([(33, 41), (8, 128)], formats.pop("dtype"))
    ours, theirs, twins = pair(2, parameters, mars_type="m", clip_norm=None, **formats)
    assert_same(ours, theirs, parameters, twins, share=0.03)


@pytest.mark.parametrize("mars_type", ["adamw", "lion"])
def test_sixteen_bit_remainders_make_bfloat16_parameters_exact(mars_type: str) -> None:
    thin = make([(40, 30)], torch.bfloat16)
    full = [nn.Parameter(p.detach().float()) for p in thin]
    one = MARS(thin, mars_type=mars_type, lr=1e-3, param_rounding="remainder16")
    other = MARS(full, mars_type=mars_type, lr=1e-3)
    for t in range(4):
        give_gradients(thin, t)
        full[0].grad = thin[0].grad.float()  # type: ignore[union-attr]
        one.step()
        other.step()
        assert torch.equal(decode_weight(thin[0].detach(), one.state[thin[0]]["param_remainder"]), full[0].detach())


def test_extreme_weights_round_as_elsewhere() -> None:
    """Subnormal numbers, ties, the largest numbers, and steps beyond them."""
    for dtype in (torch.bfloat16, torch.float16):
        for rounding in ROUNDINGS:
            values = torch.tensor([0.0, 6e-8, 5e-5, 6.1e-5, 1.0, 1.0 + 2**-11, 1.0 + 2**-9, 65504.0, -65504.0, 3e38])
            parameters = [nn.Parameter(values.to(dtype))]
            ours, theirs, twins = pair(2, parameters, lr=3e-5, weight_decay=0.0, param_rounding=rounding)
            torch.testing.assert_close(parameters[0], twins[0], rtol=0, atol=0, equal_nan=True)
            if "param_remainder" in ours.state[parameters[0]]:
                rests = (o.state[p]["param_remainder"].float() for o, p in ((ours, parameters[0]), (theirs, twins[0])))
                torch.testing.assert_close(*rests, rtol=1e-2, atol=1.5, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_eight_bit_remainders_are_drawn_as_elsewhere(dtype: torch.dtype) -> None:
    """Rounded to nearest, half of them would differ; an fp32 rounding moves one in 2^5 or 2^8."""
    parameters = make([(40, 30)], dtype)
    ours, theirs, twins = pair(1, parameters, mars_type="lion", param_rounding="remainder8")
    rests = [o.state[p]["param_remainder"] for o, p in ((ours, parameters[0]), (theirs, twins[0]))]
    assert (rests[0] != rests[1]).float().mean() < 0.1


def test_eight_bit_second_moments_are_not_zero_and_scales_show_what_is_not_finite() -> None:
    p = nn.Parameter(torch.ones(2, 128))
    optimizer = MARS([p], state_precision="8bit", clip_norm=None)
    p.grad = torch.full((2, 128), 1e-4)
    p.grad[0, 0] = 1.0  # v of the others is 1e-8 of the scale, below half of the first level, 255^-4
    p.grad[0, 1:] *= 0.01
    p.grad[1, 0] = math.inf
    optimizer.step()
    state = optimizer.state[p]
    assert (state["exp_avg_sq"][0] > 0).all()
    for name in ("exp_avg_scale", "exp_avg_sq_scale", "prev_grad_scale"):
        assert state[name].isnan().tolist() == [False, True]


# ------------------------------------------------------------------ memory layouts


@pytest.mark.parametrize("precision", ["fp32", "8bit"])
def test_memory_that_is_not_aligned(precision: str) -> None:
    parameters = [nn.Parameter(torch.randn(n + 1, generator=torch.Generator().manual_seed(n))[1:]) for n in (5, 1100)]
    assert any(p.data_ptr() % 16 for p in parameters)
    ours, theirs, twins = pair(2, parameters, optimize_1d=True, state_precision=precision)
    assert_same(ours, theirs, parameters, twins, share=0.01)


def test_gradients_laid_out_otherwise() -> None:
    for memory_format in (torch.contiguous_format, torch.channels_last):
        p = nn.Parameter(torch.randn(4, 3, 5, 2).to(memory_format=memory_format))
        q = nn.Parameter(p.detach().clone())
        ours, theirs = MARS([p], gamma=0.3), MARS([q], gamma=0.3, foreach=False)
        for t in range(3):
            g = torch.randn(4, 3, 5, 2, generator=torch.Generator().manual_seed(t))
            p.grad = g.to(memory_format=torch.channels_last) if t % 2 else g.clone()
            q.grad = g
            ours.step()
            theirs.step()
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------ what is not finite


@pytest.mark.parametrize("mars_type", ["adamw", "lion"])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("precision", ["fp32", "8bit"])
def test_gradients_that_are_not_finite_do_what_they_do_elsewhere(mars_type: str, value: float, precision: str) -> None:
    ps, qs = make([(20, 60), (3, 7)]), make([(20, 60), (3, 7)])
    ours = MARS(ps, mars_type=mars_type, state_precision=precision, gamma=0.2)
    theirs = MARS(qs, mars_type=mars_type, state_precision=precision, gamma=0.2, foreach=False)
    for t in range(2):
        for optimizer, group in ((ours, ps), (theirs, qs)):
            give_gradients(group, t)
            group[0].grad[4, 5] = value  # type: ignore[index]
            optimizer.step()
    for p, q in zip(ps, qs, strict=True):
        ours_m, theirs_m = (o.state[x] for o, x in ((ours, p), (theirs, q)))
        for name in ("exp_avg_scale",) if precision == "8bit" else ("exp_avg", "prev_grad"):
            torch.testing.assert_close(ours_m[name], theirs_m[name], rtol=1e-5, atol=1e-6, equal_nan=True)
        if mars_type == "adamw":  # torch's sign of nan is 0, the kernels' is nan
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("mars_type", ["adamw", "lion", "m"])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float32, {"max_grad_norm": 0.5, "clip_norm": None}),
        (torch.bfloat16, {"state_precision": "8bit", "param_rounding": "remainder8"}),
    ],
    ids=str,
)
def test_a_grad_scaler_leaves_unscaling_and_skipping_to_the_kernels(
    mars_type: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """Where found_inf is 1 nothing changes; else the scale, a power of 2, is as if it had not been."""
    ps, qs = make([(33, 41), (3, 7)], dtype), make([(33, 41), (3, 7)], dtype)
    options = {"mars_type": mars_type, "gamma": 0.2, "capturable": True, **SVD, **options}
    ours, plain = MARS(ps, **options), MARS(qs, **options)
    assert ours._step_supports_amp_scaling
    assert not MARS(make(), foreach=False, capturable=True)._step_supports_amp_scaling
    assert not MARS(make())._step_supports_amp_scaling
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for t in range(4):
        scaler.scale(torch.zeros(()))
        give_gradients(ps, t)
        for p in ps:
            p.grad.mul_(scaler.get_scale())  # type: ignore[union-attr]
        if skips := t in (0, 2):
            ps[0].grad[1, 1] = math.inf  # type: ignore[index]
        before = [t.clone() for p in ps for t in (p.detach(), *ours.state[p].values())]
        scaler.step(ours)
        scaler.update()
        if skips:
            after = [t for p in ps for t in (p.detach(), *ours.state[p].values())]
            assert all(torch.equal(a, b) for a, b in zip(after, before, strict=False)) or t == 0
            assert all(not s.any() for p in ps for s in ours.state[p].values() if s.ndim) or t != 0
        else:
            give_gradients(qs, t)
            plain.step()
        # 1/scale may be folded in before or after a rounding.
        for p, q in zip(ps, qs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


# ------------------------------------------------------------------ tables


def test_tables_are_found_again_and_the_oldest_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_tables, "_MOST_TABLES", 2)
    cpu = torch.device("cpu")
    triton_tables._tables.clear()
    one, two, three = (bytes([i]) * 16 for i in range(3))
    first = triton_tables.table(one, cpu)
    triton_tables.table(two, cpu)
    assert triton_tables.table(one, cpu) is first
    triton_tables.table(three, cpu)
    assert len(triton_tables._tables) == 2
    assert triton_tables.table(one, cpu) is first


def test_every_block_is_worked_on_once() -> None:
    blocks, first = triton_tables.block_map((1025, 0, 1, 2048), torch.device("cpu"))
    assert blocks.tolist() == [[0, 0], [0, 1], [2, 0], [3, 0], [3, 1]]
    assert first == [0, 2, 2, 3]
