"""What a person wants to see of a training while it runs.

    grad_momentum_cosine  <g, m> / (|g| |m|) of the step's gradient and the momentum before it: near 0, each gradient is
                          news to the momentum; near 1, the momentum could be shorter
    momentum_norm         |m|
    clip_rate             share of the tensors with a gradient correction whose corrected gradient c_t exceeds clip_norm
    noise_scale           in sequences: those of a step times (|g|^2 + |g'|^2) / (2 <g, g'>) - 1, where g and g' are
                          the gradients of two successive steps
    update_ratio/...      |x_{t+1} - x_t| / |x_t| of each parameter group

With g = G + n and independent noise n of a batch, E|g|^2 = |G|^2 + tr(Sigma)/B and E<g, g'> = |G|^2 as long as the true
gradient G changes little between the steps, so that noise_scale estimates tr(Sigma)/|G|^2, the "simple noise scale":
the batch size beyond which a larger one helps little. One value is rough; average over rows.

References: McCandlish et al., 2018, arXiv:1812.06162 (the noise scale; they compare two batch sizes instead).
"""

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from mars_optim.state import formats

_SAMPLE = 1 << 16
"""Elements of a tensor that the update ratio looks at, evenly spaced: all would need a copy of the weights."""
_MOMENTA = ("exp_avg", "exp_avg_grad", "momentum_buffer")


class Diagnostics:
    """Measures at chosen steps, in hooks around `Optimizer.step`; the others cost nothing.

    Args:
        optimizers: of one training.
        named_parameters: at least those that they train.
        sequences_per_step: the unit of the noise scale.
        state_is_shared_out: each rank has all weights, and the optimizer's state of some of them.
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        named_parameters: Iterable[tuple[str, Tensor]],
        sequences_per_step: int,
        *,
        state_is_shared_out: bool = False,
    ) -> None:
        self._sequences = sequences_per_step
        self._state_is_shared_out = state_is_shared_out
        self._armed = False
        self._sums: dict[str, Tensor] = {}
        self._clips: list[tuple[str, float, float, float]] = []
        self._samples: dict[str, list[tuple[Tensor, Tensor, float]]] = {}
        self._names = {parameter: name for name, parameter in named_parameters}
        self._is_sharded = any(isinstance(parameter, DTensor) for parameter in self._names)
        self._speed = (0, 0.0)
        self._max_grad_norm = math.inf
        for optimizer in optimizers:
            optimizer.register_step_pre_hook(self._before)
            optimizer.register_step_post_hook(self._after)

    def arm(self) -> None:
        """Measure the next step."""
        self._armed = True
        self._sums, self._clips, self._samples = {}, [], {}

    def collect(self, *, tokens: int, seconds: float) -> dict[str, float]:
        """What the step since `arm` has shown, without what is not finite. All ranks call it.

        Args:
            tokens: seen so far.
            seconds: spent in steps so far.
        """
        self._armed = False
        sums = self._reduced()
        measures = {**self._momentum(sums), **self._correction(sums), **self._updates(sums)}
        (tokens_before, seconds_before), self._speed = self._speed, (tokens, seconds)
        if 0 < tokens_before < tokens and seconds > seconds_before:
            measures["tokens_per_second"] = (tokens - tokens_before) / (seconds - seconds_before)
        measures["memory_mib"] = _memory_mib()
        return {name: value for name, value in measures.items() if math.isfinite(value)}

    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not self._armed:
            return
        for group in optimizer.param_groups:
            samples = self._samples.setdefault(self._label(group), [])
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._look_at(parameter, optimizer.state.get(parameter, {}), group)
                    sample = _sample(parameter)
                    weight = _local(parameter).numel() / max(1, sample.numel())
                    samples.append((parameter, sample.clone(), weight))

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not self._armed:
            return
        for group in optimizer.param_groups:
            label = self._label(group)
            for parameter, before, weight in self._samples.pop(label, []):
                self._add(f"{label} change", parameter, weight * (_sample(parameter) - before).square().sum())
                self._add(f"{label} weight", parameter, weight * before.square().sum())

    def _look_at(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """The scalar products that everything is made of."""
        grad = _flat(parameter.grad)
        name = self._names[parameter]
        square = grad.dot(grad)
        self._add(f"{name} gg", parameter, square)
        if (momentum := next((_stored(state, entry) for entry in _MOMENTA if entry in state), None)) is not None:
            self._add("gg", parameter, square)
            self._add("gm", parameter, grad.dot(momentum))
            self._add("mm", parameter, momentum.dot(momentum))
        if "prev_grad" in state and state["has_prev"]:
            previous = _stored(state, "prev_grad")
            self._add(f"{name} go", parameter, grad.dot(previous))
            self._add(f"{name} oo", parameter, previous.dot(previous))
            if group["clip_norm"] is not None and isinstance(group["gamma"], float):
                beta = float(group["betas"][0])
                kappa = group["gamma"] * beta / (1 - beta)
                self._clips.append((name, kappa, float(state.get("prev_coefficient", 1.0)), group["clip_norm"]))
        if (limit := group.get("max_grad_norm")) is not None:
            self._add("clipped gg", parameter, square)
            self._max_grad_norm = float(limit)

    def _add(self, name: str, parameter: Tensor, value: Tensor) -> None:
        # A sum over all ranks counts what each of several holds whole several times.
        value = value.double() * (_num_shards(parameter) / dist.get_world_size() if self._is_sharded else 1)
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def _reduced(self) -> dict[str, float]:
        if not self._sums:
            return {}
        values = torch.stack(list(self._sums.values()))
        if self._is_sharded:
            dist.all_reduce(values)
        sums = dict(zip(self._sums, values.tolist(), strict=True))
        return self._joined(sums) if self._state_is_shared_out else sums

    def _joined(self, sums: dict[str, float]) -> dict[str, float]:
        """What all ranks know together: each of the tensors whose state it has."""
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, (sums, self._clips))
        self._clips = [clip for _, clips in ranks for clip in clips]
        joined: dict[str, float] = {name: value for known, _ in ranks for name, value in known.items()}
        for name in ("gg", "gm", "mm"):
            joined[name] = math.fsum(known.get(name, 0.0) for known, _ in ranks)
        return joined

    def _momentum(self, sums: dict[str, float]) -> dict[str, float]:
        if not sums.get("mm") or not sums.get("gg"):
            return {}
        cosine = sums["gm"] / math.sqrt(sums["mm"] * sums["gg"])
        return {"momentum_norm": math.sqrt(sums["mm"]), "grad_momentum_cosine": cosine}

    def _correction(self, sums: dict[str, float]) -> dict[str, float]:
        scale, exceeding = 1.0, 0
        if "clipped gg" in sums:
            scale = min(1.0, self._max_grad_norm / (math.sqrt(sums["clipped gg"]) + 1e-6))
        for name, kappa, previous_scale, limit in self._clips:
            # |c|^2 of c = (1 + kappa) s g - kappa s' g'
            a, b = (1 + kappa) * scale, kappa * previous_scale
            square = a * a * sums[f"{name} gg"] - 2 * a * b * sums[f"{name} go"] + b * b * sums[f"{name} oo"]
            exceeding += square > limit**2
        totals: dict[str, float] = defaultdict(float)
        for key, value in sums.items():
            name, _, kind = key.rpartition(" ")
            if f"{name} go" in sums and kind in ("gg", "go", "oo"):
                totals[kind] += value
        measures = {"clip_rate": exceeding / len(self._clips)} if self._clips else {}
        if totals["go"] > 0:
            measures["noise_scale"] = self._sequences * ((totals["gg"] + totals["oo"]) / (2 * totals["go"]) - 1)
        return measures

    def _updates(self, sums: dict[str, float]) -> dict[str, float]:
        squares = {key.removesuffix(" change"): value for key, value in sums.items() if key.endswith(" change")}
        weights = {label: sums[f"{label} weight"] for label in squares}
        return {f"update_ratio/{label}": math.sqrt(squares[label] / w) for label, w in weights.items() if w > 0}

    def _label(self, group: dict[str, Any]) -> str:
        if not group["params"]:
            return "nothing"
        first = self._names[group["params"][0]].removeprefix("transformer.")
        return first if len(group["params"]) == 1 else f"{first}+{len(group['params']) - 1}"


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _flat(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return _local(tensor.detach()).flatten().float()


def _stored(state: dict[str, Any], name: str) -> Tensor:
    scale = state.get(f"{name}_scale")
    return formats.decode(_local(state[name]), None if scale is None else _local(scale), torch.float32).flatten()


def _sample(parameter: Tensor) -> Tensor:
    values = _local(parameter.detach()).flatten()
    return values[:: -(-values.numel() // _SAMPLE) or 1].float()


def _num_shards(parameter: Tensor) -> int:
    if not isinstance(parameter, DTensor):
        return 1
    mesh = parameter.device_mesh
    return math.prod(mesh.size(i) for i, placement in enumerate(parameter.placements) if isinstance(placement, Shard))


def _memory_mib() -> float:
    """The most that CUDA's allocator has held; without CUDA, what the process holds now."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20 if statm.exists() else math.nan
