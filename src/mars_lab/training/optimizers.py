"""From an `OptimizerConfig` to something the loop can step, whether it is one optimizer or two."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim.lr_scheduler import LambdaLR

from mars_lab.training.config import OptimizerConfig, TrainConfig
from mars_lab.training.scaling import LossScaling
from mars_lab.training.shampoo import Shampoo
from mars_optim import MARS, param_groups
from mars_optim.schedules import Linear, WarmupConstant, WarmupCosine, WarmupMultiStep, WarmupStableDecay

_MUON_SCALES = {"rms": "match_rms_adamw", "spectral": "original"}  # torch's names for them


class Stepper:
    """One or more torch optimizers over disjoint parameters, their schedules, global clipping and loss scaling, as one.

    `audit` says which parameter is treated how. `gradient_evaluations` is the number of gradients a step needs.
    `scaling` is for `backward` to call; it knows which steps were skipped.
    """

    def __init__(
        self, parts: list[torch.optim.Optimizer], audit: str, config: OptimizerConfig, train: TrainConfig
    ) -> None:
        self.parts = parts
        self.audit = audit
        self.gradient_evaluations = 2 if config.mode == "exact" else 1
        self._max_grad_norm = config.max_grad_norm
        self._peak_lr = config.lr
        self._multiplier = _multiplier(train)
        self._schedulers = [LambdaLR(part, self._multiplier) for part in parts]
        self._parameters: list[Tensor] = [p for part in parts for group in part.param_groups for p in group["params"]]
        self.scaling = LossScaling(self._parameters, enabled=train.precision == "fp16")

    @property
    def lr(self) -> float:
        """The rate of the next step, of the parameters that `config.lr` is for."""
        return self._peak_lr * self._multiplier(self._schedulers[0].last_epoch)

    def step(self, backward: Callable[[], float], *, measure_norm: bool) -> tuple[float, float | None]:
        """Take one step, or skip it where gradients in float16 overflow: then only the schedules go on.

        Args:
            backward: computes the mean loss of this step's batch, leaves the gradient of `scaling.scale` of it in
                `.grad`, returns the loss.
                Called twice in exact mode, at the previous and then at the current weights.
            measure_norm: also measure the gradient's norm before clipping (it costs a pass over the gradients
                where the optimizer clips by itself).

        Returns:
            The loss at the current weights, and the norm or None.
        """
        mars = self.parts[0]
        if isinstance(mars, MARS) and self.gradient_evaluations == 2:
            with mars.previous_params():
                self.scaling.unscale_(backward())
        loss = backward()
        self.scaling.unscale_(loss)
        norm = self._clip(measure_norm, clips_itself=isinstance(mars, MARS))
        for part, scheduler in zip(self.parts, self._schedulers, strict=True):
            if not self.scaling.has_overflowed:
                part.step()
            part.zero_grad(set_to_none=True)
            scheduler.step()
        self.scaling.finish_step()
        return loss, norm

    def _clip(self, measure_norm: bool, *, clips_itself: bool) -> float | None:
        if self._max_grad_norm is not None and not clips_itself:
            norm: Tensor = clip_grad_norm_(self._parameters, self._max_grad_norm)
        elif measure_norm:
            norm = get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        else:
            return None
        if not measure_norm:
            return None
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()

    def schedules_state(self) -> list[dict[str, Any]]:
        """States of the schedules; those of the optimizers are theirs to give."""
        return [scheduler.state_dict() for scheduler in self._schedulers]

    def load_schedules(self, states: list[dict[str, Any]]) -> None:
        """Undo `schedules_state`; after the optimizers have been loaded."""
        for scheduler, state in zip(self._schedulers, states, strict=True):
            scheduler.load_state_dict(state)


def build(
    model: nn.Module, config: OptimizerConfig, train: TrainConfig, replicas: dist.ProcessGroup | None = None
) -> Stepper:
    """The optimizer that `config` names, over every trainable parameter of `model`.

    `replicas`: the processes that hold whole copies of it; MARS shares its work out among them.
    """
    if config.name == "adamw":
        return _adamw(model, config, train)
    if config.name == "muon":
        return _muon(model, config, train)
    if config.name == "shampoo":
        return _shampoo(model, config, train)
    mars_type = config.name.removeprefix("mars-")
    groups = param_groups(
        model,
        mars_type,
        lr=config.lr,
        lr_1d=config.lr_1d,
        betas=config.betas,
        betas_1d=config.betas_1d,
        weight_decay=config.weight_decay,
        weight_decay_1d=config.weight_decay_1d,
        gamma=_gamma(config, train),
        clip_norm=config.clip_norm,
        polar_dtype=torch.bfloat16 if train.precision.startswith("bf16") else None,
    )
    mars = MARS(
        groups,
        lr=config.lr,
        mars_type=mars_type,
        is_approx=config.mode == "approx",
        first_step=config.first_step,
        max_grad_norm=config.max_grad_norm,
        state_precision=config.state_precision,
        param_rounding=config.param_rounding,
        exchange_precision=config.exchange_precision,
        process_group=replicas,
        shard_state=config.shard_state and replicas is not None,
    )
    return Stepper([mars], str(groups.audit), config, train)


def _adamw(model: nn.Module, config: OptimizerConfig, train: TrainConfig) -> Stepper:
    """torch.optim.AdamW; matrices and embeddings decay, norms and biases don't, as in nanoGPT."""
    named = _trainable(model)
    groups = [
        {"params": [p for p in named.values() if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in named.values() if p.dim() < 2], "weight_decay": config.weight_decay_1d},
    ]
    audit = _audit({name: "adamw, decayed" if p.dim() >= 2 else "adamw" for name, p in named.items()}, named)
    return Stepper([torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)], audit, config, train)


def _muon(model: nn.Module, config: OptimizerConfig, train: TrainConfig) -> Stepper:
    """torch.optim.Muon on the hidden matrices, torch.optim.AdamW on embeddings, head, norms and biases.

    With the scale "rms" of their updates both can share a rate.
    """
    kinds = _kinds(model, "muon", lambda p: p.dim() == 2)
    muon = torch.optim.Muon(
        _of_kind(model, kinds, "muon"),
        lr=config.lr,
        momentum=config.betas[0],
        weight_decay=config.weight_decay,
        adjust_lr_fn=_MUON_SCALES[config.muon_scale],
    )
    return _beside_adamw(muon, model, kinds, config, train)


def _shampoo(model: nn.Module, config: OptimizerConfig, train: TrainConfig) -> Stepper:
    """Shampoo on matrices and convolutions, torch.optim.AdamW on embeddings, norms and biases."""
    kinds = _kinds(model, "shampoo", lambda p: p.dim() >= 2)
    shampoo = Shampoo(
        _of_kind(model, kinds, "shampoo"),
        lr=config.lr,
        momentum=config.betas[0],
        eps=config.shampoo_eps,
        weight_decay=config.weight_decay,
        interval=config.shampoo_interval,
    )
    return _beside_adamw(shampoo, model, kinds, config, train)


def _kinds(model: nn.Module, kind: str, fits: Callable[[Tensor], bool]) -> dict[str, str]:
    """`kind` for each parameter that fits and is no embedding, "adamw" for the rest."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    named = _trainable(model)
    return {name: kind if fits(p) and id(p) not in embeddings else "adamw" for name, p in named.items()}


def _of_kind(model: nn.Module, kinds: dict[str, str], kind: str) -> list[nn.Parameter]:
    return [p for name, p in _trainable(model).items() if kinds[name] == kind]


def _beside_adamw(
    first: torch.optim.Optimizer, model: nn.Module, kinds: dict[str, str], config: OptimizerConfig, train: TrainConfig
) -> Stepper:
    """`first`, and torch.optim.AdamW on the rest."""
    rest = _of_kind(model, kinds, "adamw")
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in rest if p.dim() >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in rest if p.dim() < 2], "weight_decay": config.weight_decay_1d},
        ],
        lr=config.lr if config.lr_1d is None else config.lr_1d,
        betas=config.betas_1d,
        fused=True,
    )
    return Stepper([first, adamw], _audit(kinds, _trainable(model)), config, train)


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _audit(kinds: dict[str, str], named: dict[str, nn.Parameter]) -> str:
    return "\n".join(f"{name:40} {tuple(named[name].shape)!s:16} {kind}" for name, kind in kinds.items())


def _gamma(config: OptimizerConfig, train: TrainConfig) -> float | Linear:
    if config.final_gamma is None:
        return config.gamma
    return Linear(config.gamma, config.final_gamma, train.num_steps)


def _multiplier(train: TrainConfig) -> Callable[[int], float]:
    num_warmup_steps = round(train.warmup_fraction * train.num_steps)
    if train.schedule == "constant":
        return WarmupConstant(num_warmup_steps)
    if train.schedule == "multistep":
        return WarmupMultiStep(num_warmup_steps, (train.num_steps // 2, train.num_steps * 3 // 4))
    if train.schedule == "wsd":
        return WarmupStableDecay(num_warmup_steps, train.num_steps, train.final_lr_ratio, train.decay_fraction)
    return WarmupCosine(num_warmup_steps, train.num_steps, train.final_lr_ratio)
