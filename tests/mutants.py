"""Breaks the library on purpose, one place at a time, and asks the tests to notice.

    python tests/mutants.py [part of a name]

Each mutant replaces exact strings in a temporary copy of src/ and runs the tests that should catch it against that
copy. A string that isn't found exactly once is an error, so that a refactoring can't make a mutant say nothing; so
is a mutant under which the tests can't even be collected. Exits with 1 if any mutant survives.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import torch._dynamo

ROOT = Path(__file__).resolve().parent.parent
NUM_WORKERS = 2
BROKEN = 99
PATIENCE = 600  # seconds, three times what the longest tests take: some wait for each other for ever

TRAJECTORIES = "test_trajectories.py"
IDENTITIES = "test_identities.py"
PROTOCOL = "test_optimizer_protocol.py"
MEMORY = "test_memory.py"
FORMATS = "test_formats.py"
NATIVE = "test_native_library.py"
PRODUCT = "test_native_product.py"
POLAR = "test_polar_methods.py"
CHECKS = "test_torch_checks.py"


@dataclass(frozen=True)
class Mutant:
    """`tests` is a test file and an expression for pytest's -k; `rows` a part of rows of the equality table."""

    name: str
    replacements: tuple[tuple[str, str], ...]
    tests: tuple[str, str]
    rows: str = ""


def mutant(name: str, old: str, new: str, tests: tuple[str, str]) -> Mutant:
    return Mutant(name, ((old, new),), tests)


def sharded(name: str, old: str, new: str, rows: str) -> Mutant:
    """Noticed by rows of the equality table, whose names begin with the number of processes."""
    return Mutant(name, ((old, new),), ("test_sharding.py", f"many_processes and {rows[0]}"), rows)


def flag(name: str, backend: str = "reference") -> tuple[str, str]:
    """The trajectories under one flag."""
    return TRAJECTORIES, f"test_flag and {name}- and {backend}"


MUTANTS = [
    # The gradient correction.
    mutant(
        "sign of d_t (reference)",
        "c = c + (g * _at(batch.ratio, i)",
        "c = c - (g * _at(batch.ratio, i)",
        flag("clip_off"),
    ),
    mutant(
        "sign of d_t (foreach)",
        "torch._foreach_sub(scaled, batch.prev_grads)",
        "torch._foreach_sub(batch.prev_grads, scaled)",
        flag("clip_off", "foreach"),
    ),
    mutant(
        "1/(1-beta1) instead of beta1/(1-beta1)",
        "kappa = gamma * (beta1 / (1 - beta1))",
        "kappa = gamma * (1 / (1 - beta1))",
        (IDENTITIES, "test_2_unclipped"),
    ),
    mutant(
        "previous gradient aliases p.grad",
        "return torch._lazy_clone(grad)",
        "return grad.detach()",
        (MEMORY, "fresh_gradients or ddp"),
    ),
    mutant(
        "views of larger memory are kept",
        "storage.nbytes() != grad.numel() * grad.itemsize",
        "False",
        (MEMORY, "others_hold"),
    ),
    mutant(
        "memory that numpy holds is kept",
        "torch._C._storage_Use_Count(storage._cdata) == _SOLE and grad",
        "grad",
        (MEMORY, "others_hold"),
    ),
    mutant(
        "memory that DLPack holds is kept",
        "and grad._use_count() == _SOLE",
        "",
        (MEMORY, "others_hold"),
    ),
    mutant(
        "previous gradient forgets its clipping",
        'state["prev_coefficient"] = batch.coefficient.detach()',
        'state["prev_coefficient"] = torch.ones_like(batch.coefficient)',
        flag("max_grad_norm"),
    ),
    mutant(
        "the paper's first step is the zero one",
        'if group["first_step"] == "zero" or group["capturable"]:\n        known = True if',
        "if True:\n        known = True if True or",
        flag("gamma_large"),
    ),
    mutant(
        "every step is a first step",
        "torch._foreach_clamp_min_(flags, 1.0)",
        "torch._foreach_clamp_max_(flags, 0.0)",
        flag("clip_off"),
    ),
    mutant(
        "exact zero start uses what was evaluated",
        'if has_prev is None or group["first_step"] == "zero":',
        "if has_prev is None:",
        flag("first_step_zero"),
    ),
    mutant(
        "gamma schedule is one step ahead",
        'gamma(group["schedule_step"])',
        'gamma(group["schedule_step"] + 1)',
        (TRAJECTORIES, "test_gamma_schedule and reference"),
    ),
    # Clipping.
    mutant(
        "clip after the momentum",
        "        c = c * _at(batch.clip, i)\n        m.mul_(beta1).add_(c * (1 - beta1))",
        "        m.mul_(beta1).add_(c * (1 - beta1)).mul_(_at(batch.clip, i))\n        c = c * _at(batch.clip, i)",
        flag("clip_small"),
    ),
    mutant(
        "c_t is always normalised",
        "_corrected_norm(batch, product).clamp(min=clip_norm)",
        "_corrected_norm(batch, product)",
        flag("defaults"),
    ),
    mutant(
        "clip norm is that of g_t",
        "squared = a**2 * gg - 2 * a * b * go + b**2 * oo",
        "squared = gg",
        flag("gamma_large"),
    ),
    mutant(
        "global norm is that of one batch",
        "total = total + square.to(total.device)",
        "total = square.to(total.device)",
        flag("max_grad_norm"),
    ),
    mutant(
        "the evaluation at x_{t-1} isn't clipped globally",
        "taken.coefficients = {p: by_norm[max_norm] for p, max_norm in clipped}",
        "taken.coefficients = {}",
        flag("max_grad_norm"),
    ),
    mutant(
        "tensors below two dimensions are clipped",
        "        one_buffer=False,\n        clip_norm=None,\n",
        "        one_buffer=False,\n",
        flag("clip_small"),
    ),
    # Moments and preconditioners.
    mutant(
        "betas swapped",
        'beta1=group["betas"][0],\n        beta2=group["betas"][1]',
        'beta1=group["betas"][1],\n        beta2=group["betas"][0]',
        flag("betas"),
    ),
    mutant(
        "v of g_t, as the authors' README has it",
        "add_(c * c * (1 - beta2))",
        "add_(g * g * (1 - beta2))",
        flag("gamma_large"),
    ),
    mutant(
        "no bias correction of m",
        "bias_correction1 = 1 - treatment.beta1**t",
        "bias_correction1 = 1.0",
        (IDENTITIES, "test_1 and reference"),
    ),
    mutant(
        "v corrected by beta1",
        "(1 - treatment.beta2**t) ** -0.5",
        "(1 - treatment.beta1**t) ** -0.5",
        (IDENTITIES, "test_1 and foreach"),
    ),
    mutant(
        "eps inside the square root",
        "(v.sqrt() / bias_correction2**0.5 + treatment.eps)",
        "(v / bias_correction2 + treatment.eps).sqrt()",
        flag("eps"),
    ),
    mutant(
        "amsgrad forgets",
        "largest.copy_(torch.maximum(largest, v))",
        "largest.copy_(v)",
        flag("amsgrad"),
    ),
    mutant(
        "lion steps against the sign",
        "[m.sign() for m in",
        "[(-m).sign() for m in",
        flag("defaults"),
    ),
    mutant(
        "update scale of m by the smaller side",
        "0.2 * math.sqrt(max(rows, columns))",
        "0.2 * math.sqrt(min(rows, columns))",
        (TRAJECTORIES, "test_shape and reference"),
    ),
    mutant(
        "update scale of shampoo by columns/rows",
        "math.sqrt(max(1.0, rows / columns))",
        "math.sqrt(max(1.0, columns / rows))",
        (TRAJECTORIES, "test_shape and reference"),
    ),
    mutant(
        "matrix_transposed ignored",
        "UPDATE_SCALES[name](columns, rows) if transposed else",
        "UPDATE_SCALES[name](rows, columns) if transposed else",
        (TRAJECTORIES, "test_matrix_view and reference"),
    ),
    mutant(
        "a split tensor is one matrix",
        "    if isinstance(view, str):\n        return [flat]",
        "    if view:\n        return [flat]",
        (TRAJECTORIES, "test_matrix_view and reference"),
    ),
    mutant(
        "directions invented for zero singular values",
        "return (u * (sigma > cutoff)",
        "return (u * (sigma > -1)",
        (TRAJECTORIES, "test_rank_deficient and reference"),
    ),
    # Rates and decay.
    mutant(
        "decay not multiplied by lr (reference)",
        "x.mul_(1 - lr * weight_decay)",
        "x.mul_(1 - weight_decay)",
        flag("weight_decay"),
    ),
    mutant(
        "decay not multiplied by lr (foreach)",
        "torch._foreach_mul_(batch.params, 1 - lr * weight_decay)",
        "torch._foreach_mul_(batch.params, 1 - weight_decay)",
        flag("weight_decay", "foreach"),
    ),
    mutant(
        "1-D decay by the matrices' lr",
        "weight_decay=main.weight_decay if decay_1d is None else decay_1d",
        'weight_decay=(main.weight_decay if decay_1d is None else decay_1d) / group["lr_1d_ratio"]',
        flag("rule_1d"),
    ),
    mutant(
        "lr_1d ignored",
        'lr=lr * group["lr_1d_ratio"]',
        "lr=lr",
        flag("lr_1d"),
    ),
    mutant(
        "lr_1d stays when lr moves",
        'lr=lr * group["lr_1d_ratio"]',
        'lr=0.02 * group["lr_1d_ratio"]',
        (TRAJECTORIES, "test_lr_moves_lr_1d and reference"),
    ),
    mutant(
        "weight_decay_1d=0 taken for None",
        "main.weight_decay if decay_1d is None else decay_1d",
        "decay_1d or main.weight_decay",
        flag("weight_decay_1d_zero"),
    ),
    mutant(
        "betas_1d ignored",
        'beta1=group["betas_1d"][0]',
        'beta1=group["betas"][0]',
        flag("rule_1d"),
    ),
    mutant(
        "maximize forgotten for the previous gradient",
        "batch.difference_weight = kappa * batch.sign * before",
        "batch.difference_weight = kappa * before",
        flag("maximize"),
    ),
    # Exact mode.
    mutant(
        "the second evaluation doesn't replay the RNG",
        "        torch.set_rng_state(cpu_state)\n",
        "        pass\n",
        (PROTOCOL, "dropout"),
    ),
    mutant(
        "weights stay at x_{t-1}",
        "    finally:\n        _exchange(pairs)",
        "    finally:\n        pass",
        (PROTOCOL, "previous_weights or restores_weights"),
    ),
    mutant(
        "weights stay at x_{t-1} after an exception",
        "    try:\n        yield\n    finally:\n        _exchange(pairs)",
        "    yield\n    _exchange(pairs)",
        (PROTOCOL, "an_exception"),
    ),
    mutant(
        "both evaluations at x_t",
        "        current.copy_(previous)\n        previous.copy_(held)",
        "        previous.copy_(held)",
        (IDENTITIES, "test_7"),
    ),
    Mutant(
        "x_{t-1} is kept after the update",
        (
            ("            self._keep_params()\n", ""),
            (
                "self._steps.take(groups, members, self._scaling)\n",
                "self._steps.take(groups, members, self._scaling)\n            self._keep_params()\n",
            ),
        ),
        (IDENTITIES, "test_7"),
    ),
    mutant(
        "one evaluation serves every later step",
        "previous, self._previous = self._previous, None",
        "previous = self._previous",
        (PROTOCOL, "serves_one_step"),
    ),
    # Protocol.
    mutant(
        "the materialising step counts",
        "if only_materialises:",
        "if False:",
        (PROTOCOL, "materialising"),
    ),
    mutant(
        "load_state_dict casts to the parameter's format",
        'return {**state_dict, "state": state}',
        "return state_dict",
        (PROTOCOL, "test_resume or float32_state"),
    ),
    mutant(
        "half-precision parameters have half-precision state",
        "return torch.float32 if param.dtype in (torch.float16, torch.bfloat16) else param.dtype",
        "return param.dtype",
        (TRAJECTORIES, "test_number_format and reference"),
    ),
    mutant(
        "schedules are saved as objects",
        "schedules.to_plain(group[name])",
        "group[name]",
        (PROTOCOL, "gamma_schedules_resume"),
    ),
    mutant(
        "skip_nonfinite counts and steps all the same",
        "self._count_skipped_step()\n        return True",
        "self._count_skipped_step()\n        return False",
        (TRAJECTORIES, "skip_nonfinite"),
    ),
    mutant(
        "the clip coefficient goes through the host",
        "return replicas.add_owners(total).sqrt()",
        "return torch.tensor(total.sqrt().item())",
        (PROTOCOL, "meta_device or on_the_host"),
    ),
    # State that fits.
    mutant(
        "one buffer starts as two do",
        "seen * (1 - first * (kappa / (1 - gamma)))",
        "seen * (1 - 0 * first)",
        (MEMORY, "one_buffer_takes"),
    ),
    mutant(
        "e_t taken for m_t",
        "m = m * average_weight + g * grad_weight",
        "m = m * 1.0",
        (MEMORY, "one_buffer_takes and reference"),
    ),
    mutant(
        "a second buffer's m_t taken for e_t",
        "values = (values - prev * weight)",
        "values = (values - 0 * weight)",
        (MEMORY, "two_buffer_checkpoint"),
    ),
    mutant(
        "second moments are stored as zero",
        "codes = torch.where((codes == 0) & (y > 0), torch.ones_like(codes), codes)",
        "pass",
        (FORMATS, "never_stored_as_zero"),
    ),
    mutant(
        "8-bit momentum is rounded down",
        "< (y - low) / (high - low)",
        "< 0 * y",
        (FORMATS, "expectation"),
    ),
    mutant(
        "bf16 moments are truncated",
        "rounded = ((bits + random.to(torch.int32)) & -65536)",
        "rounded = (bits & -65536)",
        (FORMATS, "expectation"),
    ),
    mutant(
        "remainder added with the wrong sign",
        "(x.view(torch.int32) + (remainder.to(torch.int32) << shift))",
        "(x.view(torch.int32) - (remainder.to(torch.int32) << shift))",
        (FORMATS, "this_close or fp32_weight"),
    ),
    mutant(
        "a step in backward leaves its hooks",
        "for handle in handles:\n                handle.remove()",
        "for handle in handles:\n                pass",
        (MEMORY, "after_an_exception"),
    ),
    mutant(
        "offloaded state stays as it was",
        "home.copy_(visitor, non_blocking=True)",
        "pass",
        (MEMORY, "offloaded"),
    ),
    sharded("norms of shards", "dist.all_reduce(table, group=group_over(mesh, cut))", "pass", "2 fsdp adamw train"),
    sharded(
        "norms of replicas counted twice",
        "if all(dim in spread.shard_dims or coordinate[dim] == 0 for dim in cut):",
        "if True:",
        "4 fsdp 2 x tp 2 adamw train",
    ),
    sharded(
        "clip of each shard by itself",
        "return backend.measures_clip and not batch.is_sharded",
        "return backend.measures_clip",
        "2 fsdp adamw train max_grad_norm=None",
    ),
    sharded("polar factors of shards", "if batch.spread is not None and prec", "if False and prec", "2 fsdp m train"),
    sharded("no update scale for shards", "job.direction[within(shared, mine)] *= scale", "pass", "2 fsdp m train"),
    sharded("what others updated", "self.replicas.tell_(", "list(", "2 ddp + sharded state adamw train"),
    sharded(
        "total norm of own parameters",
        "return replicas.add_owners(total)",
        "return total",
        "2 ddp + sharded state lion",
    ),
    sharded("everyone skips alone", "return bool(count > 0)", "return flag", "4 hsdp 2x2 adamw train skip"),
    sharded(
        "partial gradients",
        "return grad.redistribute(param.device_mesh, param.placements)",
        "return like(local(grad), param)",
        "2 tp adamw partial",
    ),
    sharded(
        "8-bit codes saved without scales",
        'values = formats.decode(local(tensor), result.pop(f"{name}_scale"), torch.float32)',
        'values = local(tensor).float() / result.pop(f"{name}_scale").numel()',
        "4 fsdp adamw move state_precision",
    ),
    sharded(
        "plain state loaded whole",
        "Shielded(piece_of(whole.to(param.device), param) if",
        "Shielded(whole if",
        "4 alone",
    ),
    mutant(
        "the momentum as previous gradient",
        'return state["prev_grad"], state.get',
        'return state["exp_avg"], state.get',
        (TRAJECTORIES, "lion"),
    ),
    mutant(
        "the smallest first",
        "key=lambda i: (-works[i], i))",
        "key=lambda i: (works[i], i))",
        ("test_sharding.py", "nobody"),
    ),
    mutant(
        "experts travel",
        "allowed.append(range(holders[0], num_slots, num_shards) if len(holders) == 1 else None)",
        "allowed.append(None)",
        ("test_sharding.py", "stays"),
    ),
    mutant(
        "spacing of codes alike",
        "values.abs().sqrt_().mul_(top)",
        "values.abs().mul_(top)",
        ("test_wire.py", "half_a_spacing"),
    ),
    mutant(
        "ten bits back",
        "_BITS_THERE, _BITS_BACK = 10, 6",
        "_BITS_THERE, _BITS_BACK = 10, 10",
        ("test_wire.py", "both_ways"),
    ),
    mutant(
        "a scale rounded down",
        "torch.where(rounded < scales,",
        "torch.where(rounded > 2 * scales,",
        ("test_wire.py", "half_a_spacing"),
    ),
    mutant(
        "the scale's bits over whole codes",
        "bits - 1) << 1",
        "bits)",
        ("test_wire.py", "half_a_spacing"),
    ),
    sharded(
        "gathered matrices not rounded",
        "momentum[held] = there.rounded(momentum[held])",
        "momentum[held] = momentum[held]",
        "2 fsdp m oracle",
    ),
    sharded(
        "copies of matrices coded",
        "self.there = Wire(self.there.dtype)",
        "pass",
        "2 ddp m oracle",
    ),
    # The native kernels: each is built anew.
    mutant("native: clip factor upside down", "call_.clip_norm / norm", "norm / call_.clip_norm", (NATIVE, "test_")),
    mutant(
        "native: v of c", "fused(k.beta2, v, k.rest2 * (c * c))", "fused(k.beta2, v, k.rest2 * c)", (NATIVE, "test_")
    ),
    mutant("native: nan that rounds to zero", "!kIsRounded || x == x", "true", (NATIVE, "every_nan")),
    mutant(
        "native: nothing amended",
        "if (clip != 1) kernels_.amend",
        "if (false) kernels_.amend",
        (NATIVE, "norm_is_known"),
    ),
    mutant(
        "native: nothing updated early",
        "return kernels_.can_advance(call_, r) ?",
        "return false ?",
        (NATIVE, "was_amended"),
    ),
    mutant("native: every gradient is usual", "kUsual = 4;", "kUsual = 1e30;", (NATIVE, "norm_is_known")),
    mutant("native: any line goes on", "sums[j] <= limit ? 0 : -1", "0", (NATIVE, "norm_is_known")),
    mutant(
        "native: squares of a line alone",
        "sums[j] = fused(g[j], g[j], sums[j])",
        "sums[j] = g[j] * g[j]",
        (NATIVE, "norm_is_known"),
    ),
    mutant("native: a tail goes on", "add_line(rest, g + i, limit, sums)", "true", (NATIVE, "norm_is_known")),
    mutant(
        "native: squares of what is left are left out",
        " + bound_of_squares(g + counted, int(count - counted))",
        "",
        (NATIVE, "norm_is_known"),
    ),
    mutant(
        "native: chunks put off are forgotten",
        "kernels_.update(call_, record, start + done, length - done, clip);",
        "",
        (NATIVE, "norm_is_known"),
    ),
    mutant("native: amended from what is gone", " && r.next != r.prev;", ";", (NATIVE, "gradient_goes")),
    mutant("native: one line for all", "put_line(kept, next + i,", "put_line(kept, next,", (NATIVE, "gradient_goes")),
    mutant(
        "native: a clip that is nan",
        "a(quiet<true>(T(clip * r.a))), b(quiet<true>(T(clip * r.b)))",
        "a(T(clip * r.a)), b(T(clip * r.b))",
        (NATIVE, "every_nan"),
    ),
    mutant(
        "native: a factor that is nan", "ratio(quiet<true>(T(r.ratio)))", "ratio(T(r.ratio))", (NATIVE, "every_nan")
    ),
    mutant(
        "a previous gradient at hand is written over",
        "prev_grads[i] if is_free else torch.empty_like(prev_grads[i])",
        "prev_grads[i]",
        (MEMORY, "at_hand"),
    ),
    mutant("a storage at hand is written over", "and getrefcount(storage) == _STORAGE_UNHELD", "", (MEMORY, "at_hand")),
    mutant(
        "shared memory changes places", "not tensor.untyped_storage().is_shared()", "True", (MEMORY, "in_shared_memory")
    ),
    mutant("previous gradients before they are", "if has_begun[0] and op", "if op", (MEMORY, "interruption")),
    mutant("spares after an interruption", "self._buffers.clear()", "pass", (MEMORY, "interruption")),
    mutant("spares without bound", ", room // shape.numel())", ")", (MEMORY, "spare_memory")),
    mutant(
        "spares outlive the state",
        "Completed(), {}, Spares()",
        "Completed(), {}, self.spares",
        (MEMORY, "spare_memory"),
    ),
    mutant(
        "native: x not amended",
        "x[i] += adamw_step(was_0 ? of_m : m[i], was_0 ? of_v : v[i], k) - adamw_step(mi, vi, k);",
        "",
        (NATIVE, "norm_is_known"),
    ),
    mutant(
        "native: v lost in its rounding",
        "larger(v[i] - of_v, spacing)",
        "larger(v[i] - of_v, T(0))",
        (NATIVE, "narrow_state"),
    ),
    mutant("native: v lost in its fp32 rounding", "0x1p-23 : 0x1p-52", "0x1p-60 : 0x1p-90", (NATIVE, "too_short")),
    mutant(
        "native: no history is some history",
        "m[i] == once_stored<kNarrow>(of_m, random[i]) && v[i]",
        "!kNarrow && v[i]",
        (NATIVE, "narrow_state and without"),
    ),
    mutant(
        "native: c_t kept",
        "vmax[i] = top;\n        if (kKeep) keep(next, i, gi);",
        "vmax[i] = top;\n        if (kKeep) keep(next, i, c);",
        (NATIVE, "test_"),
    ),
    mutant("native: one draw for m and v", "put(v, i, vi, random >> 16)", "put(v, i, vi, random)", (NATIVE, "test_")),
    mutant("native: ratio ignored", "fused(ratio, g, -get<T>(prev, i))", "(g - get<T>(prev, i))", (NATIVE, "test_")),
    mutant(
        "native: products of the difference", "fused(gi, other, go)", "fused(gi, gi - other, go)", (NATIVE, "test_")
    ),
    mutant(
        "native: amsgrad loses nan", "return x >= y || x != x ? x : y;", "return x >= y ? x : y;", (NATIVE, "test_")
    ),
    mutant("native: another hash", "h ^= h >> 13", "h ^= h >> 14", (NATIVE, "test_")),
    mutant("native: a second moment of zero", "code == 0 && x > 0 ? 1 : code", "code", (NATIVE, "test_")),
    mutant("native: fp16 subnormals", "magnitude < 0x400 ? subnormal : bits", "bits", (NATIVE, "test_")),
    mutant(
        "native: remainder rounded down",
        "F::round(x[i], 1u << (F::kDropped - 1))",
        "F::round(x[i], 0)",
        (NATIVE, "test_"),
    ),
    mutant(
        "native: a triangle's mirror too low", "std::max(top, column + kColumns)", "top + kColumns", (PRODUCT, "test_")
    ),
    mutant(
        "native: bfloat16 pairs swapped",
        "or_si512(low, _mm512_slli_epi32(high",
        "or_si512(high, _mm512_slli_epi32(low",
        (PRODUCT, "test_"),
    ),
    mutant("native: an addend's factor", "_mm512_set1_ps(beta), x)", "_mm512_set1_ps(alpha), x)", (PRODUCT, "test_")),
    # Polar factors.
    mutant("no restart", "count = -(-steps // longest)", "count = 1", (POLAR, "form_and_restarts")),
    mutant("three steps in half precision", "2 if dtype in HALF else 3", "3", (POLAR, "far_above")),
    mutant("no margin at restarts", "_RESTART_MARGIN = 1.05, 1.2", "_RESTART_MARGIN = 1.05, 1.0", (POLAR, "far_above")),
    mutant("margins ignored", "low / margin, high * margin", "low, high", (POLAR, "margins")),
    mutant(
        "a diagonal left out",
        "symmetric_product(v, v, r, beta=e), f)",
        "symmetric_product(v, v, r, beta=e), 0.0)",
        (POLAR, "applies_its_polynomials"),
    ),
    mutant(
        "polynomials without room for rounding",
        "(14.91642134, -16.11022865, 2.662755881, 1.008761768, -2.047902869, -0.2111516051, 0.5826305979)",
        "(15.81858491, -16.91006704, 2.715397178, 0.9090198458, -2.188411659, -0.2309137531, 0.3059977332)",
        (POLAR, "large_direction"),
    ),
    mutant("degree 17 in fp32", "dtype in HALF and rows >= GRAM_FROM", "rows >= GRAM_FROM", (POLAR, "nothing_is_said")),
    mutant("Remez from above only", "high = 2 - low", "high = 1.0", (POLAR, "published")),
    mutant("entries not scaled first", "x = x / _divisor(power, x)", "x = x / 1", (POLAR, "low_precision or dtype")),
    mutant(
        "QDWH without its weights",
        "x = (b / c) * x + (a - b / c) * torch.cholesky_solve",
        "x = (b / c) * x + a * torch.cholesky_solve",
        (POLAR, "factorisations"),
    ),
    mutant(
        "failed Newton believed",
        "failed = ~(defect <= 100 * tolerance)",
        "failed = defect < 0",
        (POLAR, "rank_deficient or inf_and_nan"),
    ),
    mutant("sketch of one more", "< rank)", "<= rank)", (POLAR, "sketch")),
    mutant(
        "strips without their factor",
        "beta=beta, alpha=alpha, out=out",
        "beta=beta, alpha=1.0, out=out",
        (POLAR, "blocked"),
    ),
]


def break_it(source: Path, mutated: Mutant) -> str:
    """Replaces the strings wherever in the package they stand; returns the files' names."""
    files: list[str] = []
    for old, new in mutated.replacements:
        texts = {path: path.read_text() for path in sorted(source.rglob("*.*")) if path.suffix in (".py", ".h", ".cpp")}
        if (count := sum(text.count(old) for text in texts.values())) != 1:
            raise SystemExit(f"{mutated.name}: mars_optim has this {count} times, not once:\n{old}")
        (path,) = (path for path, text in texts.items() if old in text)
        broken = texts[path].replace(old, new)
        if path.suffix == ".py":
            compile(broken, str(path), "exec")
        path.write_text(broken)
        files.append(str(path.relative_to(source / "mars_optim")))
    return ", ".join(dict.fromkeys(files))


def run_tests(source: Path, mutated: Mutant, rebuild: bool) -> None:
    """In a child process: the tests against the copy in `source`; the exit code is pytest's, or BROKEN."""
    os.setsid()  # with the processes it starts
    exit_code = BROKEN
    try:
        os.chdir(ROOT)
        sys.dont_write_bytecode = True  # nothing is left behind in the tree
        sys.path.insert(0, str(source))
        silent = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(silent, stream)
        if rebuild:
            build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            subprocess.run(build, cwd=source.parent, check=True)
        import mars_optim

        if Path(mars_optim.__file__).parent.parent == source:  # and not the installed library
            file, expression = mutated.tests
            os.environ["EQUALITY_ROWS"] = mutated.rows
            exit_code = pytest.main(
                ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", f"tests/{file}", "-k", expression]
            )
    finally:
        os._exit(exit_code)  # an exception's own exit code would be 1, which says "caught"


def copy_of_source(directory: Path) -> Path:
    source = directory.resolve() / "src"
    shutil.copytree(ROOT / "src" / "mars_optim", source / "mars_optim", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):  # what building the native kernels takes
        shutil.copy(ROOT / name, directory)
    return source


def check_strings(mutants: list[Mutant], directory: Path) -> None:
    """A string that moved is reported at once, not after minutes."""
    for i, mutated in enumerate(mutants):
        break_it(copy_of_source(directory / f"check{i}"), mutated)


def controls(mutants: list[Mutant]) -> list[Mutant]:
    """One for each test file, with nothing broken: what catches a mutant has to pass without it."""
    expressions: dict[str, set[str]] = {}
    for mutated in mutants:
        file, expression = mutated.tests
        expressions.setdefault(file, set()).add(f"({expression})")
    return [Mutant(f"nothing ({f})", (), (f, " or ".join(sorted(e)))) for f, e in expressions.items()]


def run_all(mutants: list[Mutant], directory: Path) -> int:
    """Runs NUM_WORKERS mutants at a time, prints a row for each, returns how many went otherwise than they should.

    Children are forked from this process, which has imported torch and pytest but not mars_optim: importing torch
    fifty times would take most of the time.
    """
    fork = multiprocessing.get_context("fork")
    waiting = list(enumerate(mutants))
    running: dict[int, tuple[Mutant, str, BaseProcess, float]] = {}  # by the process's sentinel
    hung: set[int] = set()
    num_unexpected = 0
    while waiting or running:
        while waiting and len(running) < NUM_WORKERS:
            i, mutated = waiting.pop(0)
            source = copy_of_source(directory / str(i))
            files = break_it(source, mutated)
            child = fork.Process(target=run_tests, args=(source, mutated, ".py" not in files and files != ""))
            child.start()
            running[child.sentinel] = mutated, files, child, time.monotonic()
        for sentinel, (_, _, child, start) in running.items():
            if time.monotonic() - start > PATIENCE and child.pid is not None:
                os.killpg(child.pid, signal.SIGKILL)
                hung.add(sentinel)
        for sentinel in wait(list(running), timeout=10):
            mutated, files, child, start = running.pop(int(sentinel))  # type: ignore[arg-type]
            child.join()
            outcome = "hung" if sentinel in hung and mutated.replacements else outcome_of(mutated, child.exitcode)
            num_unexpected += outcome not in ("caught", "hung", "passed")
            print(f"{outcome:9} {time.monotonic() - start:5.1f} s  {files:24} {mutated.name}", flush=True)
    return num_unexpected


def outcome_of(mutated: Mutant, exit_code: int | None) -> str:
    """pytest's exit codes: 0 all passed, 1 some failed, 2 and up: nothing was collected, or it couldn't be."""
    if exit_code == 0:
        return "SURVIVED" if mutated.replacements else "passed"
    if exit_code == 1:
        return "caught" if mutated.replacements else "FAILED"
    return f"BROKEN (exit code {exit_code})"


def main(arguments: list[str]) -> int:
    wanted = [m for m in MUTANTS if not arguments or arguments[0] in m.name]
    if not wanted:
        raise SystemExit(f"no mutant's name contains {arguments[0]!r}")
    torch.set_num_threads(1)  # a thread pool doesn't survive a fork, and the workers shouldn't compete
    with tempfile.TemporaryDirectory() as directory:
        check_strings(wanted, Path(directory))
        num_unexpected = run_all([*controls(wanted), *wanted], Path(directory))
    print(f"{len(wanted)} mutants, {num_unexpected} survived or told nothing")
    return 1 if num_unexpected else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
