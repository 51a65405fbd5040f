"""The configuration of a run: frozen, typed, and written to `config.json` as it was used."""

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Annotated, Any, Literal

import torch
import tyro

from mars_lab.errors import InputError
from mars_lab.tasks.language import LanguageConfig
from mars_lab.tasks.vision import VisionConfig
from mars_lab.training.shampoo import Shampoo
from mars_optim import MARS

OptimizerName = Literal["adamw", "muon", "shampoo", "mars-adamw", "mars-lion", "mars-shampoo", "mars-m"]


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer and its hyperparameters; those that a type doesn't have are left unused."""

    name: OptimizerName = "mars-m"
    """`adamw` and `muon` are torch's own, `shampoo` is as published (Gupta et al., 2018), the others are MARS."""
    mode: Literal["approx", "exact"] = "approx"
    """MARS only. `exact` evaluates two gradients a step: this batch at the previous and the current weights."""
    lr: float = 0.02
    """Peak learning rate; of the matrices where `lr_1d` is given."""
    lr_1d: float | None = None
    """MARS, Muon and Shampoo: peak rate of norms, biases and (all but mars-adamw and mars-lion) embeddings; None means
    `lr`."""
    betas: tuple[float, float] = (0.95, 0.99)
    """Decay of the momentum and of the second moment. Muon and Shampoo use the first."""
    muon_scale: Literal["rms", "spectral"] = "rms"
    """Muon: the scale of its updates, 0.2 sqrt(max(rows, cols)) as in Moonlight and MARS-M, or
    sqrt(max(1, rows / cols)) as in Muon's first version and MARS-Shampoo."""
    shampoo_eps: float = 1e-4
    """Shampoo: what its preconditioners begin with on their diagonals."""
    shampoo_interval: int = 20
    """Shampoo: steps between computations of the preconditioners' inverse roots, after as many with one each."""
    betas_1d: tuple[float, float] = (0.9, 0.95)
    """The same for what `lr_1d` is for."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices and embeddings."""
    weight_decay_1d: float = 0.0
    """The same of norms and biases."""
    gamma: float = 0.025
    """MARS: strength of the gradient correction."""
    final_gamma: float | None = None
    """MARS: gamma at the end, reached in equal steps; None keeps it constant."""
    first_step: Literal["paper", "zero"] = "paper"
    """MARS: what the first gradient is corrected by: nothing, or as if the gradient before it had been 0."""
    clip_norm: float | None = 1.0
    """MARS: limit on the norm of each corrected gradient; None switches it off."""
    max_grad_norm: float | None = 1.0
    """Limit on the norm of the whole gradient; None switches it off."""
    state_precision: Literal["fp32", "bf16", "8bit"] = "fp32"
    """MARS: how moments and previous gradient are stored."""
    param_rounding: Literal["nearest", "stochastic", "kahan", "remainder8", "remainder16"] = "remainder16"
    """MARS: how bf16 weights (train.precision=bf16-params) are rounded, and what is kept of the rest."""
    exchange_precision: Literal["fp32", "bf16", "8bit"] | None = None
    """MARS-M and MARS-Shampoo on several processes: how matrices travel to where they are orthogonalised and back; None
    means bf16 under bf16, otherwise fp32."""

    label: str = ""
    """What tables and figures call it; by default its name, with -exact in exact mode."""
    shard_state: bool = False
    """MARS on several processes with train.parallel=ddp: each keeps the state of a share of the weights (ZeRO 1)."""

    def __post_init__(self) -> None:
        if self.shard_state and (not self.name.startswith("mars-") or self.mode == "exact"):
            raise InputError(
                "optimizer.shard_state is for the MARS types in approx mode; with others, Shampoo excepted, use "
                "--parallel fsdp"
            )
        if self.mode == "exact" and not self.name.startswith("mars-"):
            raise InputError(f"optimizer.mode=exact is for the MARS types, not for {self.name!r}")
        stores_otherwise = self.state_precision != "fp32" or self.param_rounding != "remainder16"
        if stores_otherwise and not self.name.startswith("mars-"):
            raise InputError(
                f"optimizer.state_precision and optimizer.param_rounding are for the MARS types, not for {self.name!r}"
            )
        if self.exchange_precision is not None and self.name not in ("mars-m", "mars-shampoo"):
            raise InputError(
                f"optimizer.exchange_precision is for mars-m and mars-shampoo, whose matrices travel, not "
                f"for {self.name!r}"
            )
        shared = ("lr", "lr_1d", "betas", "betas_1d", "weight_decay", "weight_decay_1d", "gamma", "clip_norm")
        try:  # MARS knows the ranges, and the other optimizers' are the same
            MARS([torch.zeros(1)], **{name: getattr(self, name) for name in (*shared, "first_step", "max_grad_norm")})
            MARS([torch.zeros(1)], gamma=self.gamma if self.final_gamma is None else self.final_gamma)
        except ValueError as error:
            raise InputError(f"optimizer.{error}") from None
        try:
            Shampoo([torch.zeros(1)], eps=self.shampoo_eps, interval=self.shampoo_interval)
        except ValueError as error:
            raise InputError(f"optimizer.shampoo_{error}") from None


@dataclass(frozen=True)
class TrainConfig:
    """How long, how large, how often."""

    num_steps: int = 400
    batch_size: int = 16
    """Sequences in one forward and backward pass, of all processes together."""
    num_accumulation_steps: int = 1
    """Passes whose gradients are averaged into one step."""
    schedule: Literal["cosine", "wsd", "constant", "multistep"] = "cosine"
    """Learning rate after the warm-up; wsd is constant, then linear over the last part; multistep falls to a tenth
    at half and again at three quarters of the steps."""
    decay_fraction: float = 0.2
    """wsd: share of the steps in which the learning rate falls."""
    warmup_fraction: float = 0.1
    """Share of the steps in which the learning rate rises to its peak."""
    final_lr_ratio: float = 0.1
    """Learning rate at the end, as a multiple of the peak (cosine and wsd)."""
    precision: Literal["auto", "fp32", "fp16", "bf16", "bf16-params"] = "auto"
    """bf16 and fp16 run the model under autocast, fp16 with loss scaling; bf16-params also stores its weights in bf16.
    auto: bf16 where the hardware multiplies it, otherwise fp32."""
    parallel: Annotated[Literal["ddp", "fsdp", "hsdp", "tp"], tyro.conf.arg(aliases=("--parallel",))] = "ddp"
    """What several processes divide: the batch alone (ddp), also the weights and the optimizer's state (fsdp; hsdp
    within groups), or also each layer within groups (tp). docs/cluster.md says which to take."""
    group_size: int | None = None
    """Processes in a group of hsdp or tp; None means those of a node."""
    timeout: float = 600.0
    """Seconds without progress after which a process is taken for hung and the training ends with its name."""
    compile: bool = False
    """Compile the model; pays off in long runs only."""
    device: str = "auto"
    """auto: cuda if there is one, otherwise cpu."""
    seed: int = 0
    """Of the weights, the order of the data and dropout."""
    eval_every: int = 50
    """Steps between evaluations; the first and the last step are always evaluated."""
    checkpoint_every: int = 100
    """Steps between checkpoints; one is always written at the end."""
    num_checkpoints: int = 2
    """Checkpoints kept, the newest ones."""
    wandb: bool = False
    """Log to Weights & Biases, too (needs the package wandb)."""

    def __post_init__(self) -> None:
        positive = ("num_steps", "batch_size", "num_accumulation_steps", "eval_every", "checkpoint_every")
        for name in (*positive, "num_checkpoints"):
            if getattr(self, name) < 1:
                raise InputError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        if self.group_size is not None and self.group_size < 1:
            raise InputError(f"train.group_size must be at least 1, got {self.group_size}")
        if not self.timeout > 0:
            raise InputError(f"train.timeout must be above 0 seconds, got {self.timeout}")
        for name in ("warmup_fraction", "final_lr_ratio", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"train.{name} must be in [0, 1], got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"train.seed must be in [0, 2**32), got {self.seed}")
        try:
            device = torch.device("cpu" if self.device == "auto" else self.device)
        except RuntimeError:
            raise InputError(f"train.device must be auto, cpu or cuda, got {self.device!r}") from None
        if self.wandb and find_spec("wandb") is None:
            raise InputError("train.wandb needs the package wandb: pip install wandb")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise InputError(f"train.device is {self.device!r}, but this torch sees no CUDA device; use auto or cpu")

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """What the model multiplies in, under autocast; None switches that off."""
        return {"fp32": None, "fp16": torch.float16}.get(self.precision, torch.bfloat16)

    def resolved(self) -> "TrainConfig":
        """The same with every `auto` replaced by what this machine has."""
        device, precision = self.device, self.precision
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if precision == "auto":
            cpu = torch.cpu.get_capabilities()
            has_bf16 = device != "cpu" or cpu.get("avx512_bf16") or cpu.get("amx_bf16")
            precision = "bf16" if has_bf16 else "fp32"
        return dataclasses.replace(self, device=device, precision=precision)


@dataclass(frozen=True)
class RunConfig:
    """Everything that determines a run."""

    # The recipe's kind of task is the one whose fields are flags.
    task: Annotated[LanguageConfig | VisionConfig, tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands] = field(
        default_factory=LanguageConfig
    )
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if isinstance(self.task, VisionConfig) and self.train.parallel != "ddp":
            raise InputError(
                f"--parallel {self.train.parallel} is not for image classifiers, whose batch norm has statistics "
                "of its own on each process; use ddp"
            )
        if self.optimizer.name == "shampoo":
            self._check_shampoo()

    def _check_shampoo(self) -> None:
        if self.train.parallel != "ddp":
            raise InputError(
                f"--parallel {self.train.parallel} is not for shampoo, whose preconditioners need whole gradients on "
                "each process; use --parallel ddp, or --optimizer.name mars-shampoo"
            )
        if self.train.precision == "bf16-params":
            raise InputError(
                "train.precision=bf16-params is not for shampoo, whose preconditioners need fp32 gradients; use bf16"
            )

    @property
    def language(self) -> LanguageConfig:
        """The task of a run that trains a language model.

        Raises:
            InputError: this one doesn't.
        """
        if not isinstance(self.task, LanguageConfig):
            raise InputError(
                f"this needs a language model, but the run's model is {self.task.model.name}; an image classifier is "
                "judged by `mars evaluate RUN` and exported by `mars export FOLDER RUN --to safetensors`"
            )
        return self.task


def from_dict(cls: Any, values: dict[str, Any], path: str = "") -> Any:
    """Undo `dataclasses.asdict`, also after a trip through JSON.

    Raises:
        InputError: a key that `cls` doesn't have.
    """
    hints = typing.get_type_hints(cls)
    if unknown := set(values) - set(hints):
        raise InputError(f"unknown configuration key {path}{sorted(unknown)[0]}; known: {', '.join(hints)}")
    return cls(**{name: _restore(hints[name], value, f"{path}{name}.") for name, value in values.items()})


def _restore(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, path)
    if isinstance(hint, types.UnionType):
        arms = [arm for arm in hint.__args__ if arm is not types.NoneType]
        hint = arms[0]
        if isinstance(value, dict):  # of several kinds of configuration, the one with these fields
            hint = next((arm for arm in arms if set(value) <= set(typing.get_type_hints(arm))), hint)
            return from_dict(hint, value, path)
    return tuple(value) if typing.get_origin(hint) is tuple and value is not None else value
