"""How pieces of matrices travel between ranks: what arrives, in how many bytes, what becomes of the polar factor."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

from mars_optim import MARS, polar_factor
from mars_optim.sharding import wires

CPU = torch.device("cpu")
CODED = wires("8bit", torch.float32)
quick = settings(derandomize=True, deadline=None, database=None)
BITS = (10, 6)


def piece_of(size: int, seed: int, exponent: int, spread: float) -> Tensor:
    """Return `size` numbers near 10^exponent, whose logarithms spread so much."""
    generator = torch.Generator().manual_seed(seed)
    magnitudes = (spread * torch.randn(size, generator=generator, dtype=torch.float64)).exp() * 10.0**exponent
    return magnitudes * torch.randn(size, generator=generator, dtype=torch.float64).sign()


pieces = st.builds(
    piece_of, st.integers(1, 70), st.integers(0, 99), st.integers(-30, 30), st.floats(0, 3, exclude_min=True)
)


@quick
@given(st.lists(pieces, max_size=5), st.sampled_from([torch.float32, torch.float64]))
def test_an_element_is_off_by_no_more_than_half_a_spacing(given_pieces: list[Tensor], dtype: torch.dtype) -> None:
    sent, sizes = [piece.to(dtype) for piece in given_pieces], [len(piece) for piece in given_pieces]
    for wire, bits in zip(wires("8bit", dtype), BITS, strict=True):
        buffer = wire.encode(sent, CPU)
        assert buffer.dtype == torch.uint8
        assert len(buffer) == wire.length(sizes)
        for piece, arrived in zip(sent, wire.decode(buffer, sizes), strict=True):
            assert arrived.dtype == dtype
            if len(piece) < 16:
                assert torch.equal(arrived, piece.to(torch.bfloat16).to(dtype))
                continue
            place, end = torch.arange(len(piece)), len(piece) // 4 * 4
            top = 2.0 ** (torch.where(place < 16, bits - 1, torch.where(place < end, bits, 8)) - 1) - 1
            scale = piece.abs().max() * (1 + 2**-7)  # at most: rounded up to bfloat16
            bound = scale * ((piece.abs() / scale).sqrt() / top + 1 / (4 * top**2))
            # In fp32 quotient and root have been rounded, too.
            assert ((arrived - piece).abs() <= bound + 1e-6 * scale).all()
            assert torch.equal(wire.rounded(-piece), -wire.rounded(piece))


@quick
@given(st.lists(st.integers(16, 5000), max_size=9))
def test_both_ways_together_are_two_bytes_an_element(sizes: list[int]) -> None:
    there, back = CODED
    assert there.length(sizes) + back.length(sizes) == 2 * sum(sizes)


def test_pieces_too_small_for_their_scale_travel_as_bfloat16() -> None:
    assert [wire.length([1, 15]) for wire in CODED] == [32, 32]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_so_in_its_own_piece(bad: float) -> None:
    spoilt, fine, small = torch.linspace(-1, 1, 23), torch.linspace(-1, 1, 18), torch.tensor([1.0, bad])
    spoilt[20] = bad
    for wire in CODED:
        first, second, third = wire.decode(wire.encode([spoilt, fine, small], CPU), [23, 18, 2])
        assert not first.isfinite().any()
        assert second.isfinite().all()
        assert third.isfinite().tolist() == [True, False]


def test_zeros_arrive_as_zeros_and_the_largest_as_itself() -> None:
    sent, expected = torch.zeros(24), torch.zeros(24)
    sent[17], sent[18] = -3.0, 1e-30
    expected[17] = -3.0
    for wire in CODED:
        zero, some = wire.decode(wire.encode([torch.zeros(19), sent], CPU), [19, 24])
        assert torch.equal(zero, torch.zeros(19))
        assert torch.equal(some, expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_without_codes_the_values_travel(precision: str) -> None:
    dtype = torch.float64 if precision == "fp32" else torch.bfloat16
    values = torch.randn(7, dtype=torch.float64)
    for wire in wires(precision, torch.float64):
        assert wire.item_bytes * wire.length([7]) == 7 * dtype.itemsize
        assert torch.equal(wire.rounded(values), values.to(dtype))


@pytest.mark.parametrize("shape", [(96, 96), (192, 48), (64, 320)])
@pytest.mark.parametrize("ratio", [3.0, 30.0])
def test_the_polar_factor_moves_no_more_than_its_theory_says(shape: tuple[int, int], ratio: float) -> None:
    """||U(A) - U(B)|| <= 2 ||A - B|| / (sigma_min(A) + sigma_min(B)) in the Frobenius norm (Li, 1995)."""
    generator = torch.Generator().manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
    there, back = wires("8bit", torch.float64)
    momentum = u * torch.logspace(0, -math.log10(ratio), min(shape), dtype=torch.float64) @ vh
    arrived = torch.cat([there.rounded(half) for half in momentum.chunk(2)])
    error, least = (arrived - momentum).norm(), sum(torch.linalg.svdvals(m).min() for m in (momentum, arrived))
    assert error < 0.005 * momentum.norm()
    factor = polar_factor(arrived, "svd")
    assert (factor - u @ vh).norm() <= 2 * error / least
    returned = torch.cat([back.rounded(half) for half in factor.chunk(2)])
    assert (torch.linalg.svdvals(returned) - 1).abs().max() < 0.1  # docs/sharding.md


def test_exchange_precision_is_checked_and_stays_as_it_was_constructed() -> None:
    with pytest.raises(ValueError, match="exchange_precision must be None or one of fp32, bf16, 8bit; got 'fp8'"):
        MARS([Parameter(torch.zeros(2, 2))], exchange_precision="fp8")
    first, second = (MARS([Parameter(torch.zeros(2, 2))], exchange_precision=p) for p in ("8bit", "bf16"))
    second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["exchange_precision"] == "bf16"
