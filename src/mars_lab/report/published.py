"""Figures of the papers: final validation losses of GPT-2, losses and accuracies on CIFAR.

They go by what was trained: `gpt2-<size>-<corpus>-<optimizer>`, as the recipes are called, with `owt` for OpenWebText
and `fwe` for FineWeb-Edu.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_BILLION = 10**9

BY_BUDGET: Mapping[str, tuple[float, float, float]] = {
    # Best validation loss at 5, 20 and 50 billion tokens: the README's table.
    "gpt2-small-owt-adamw": (3.193, 3.024, 2.885),
    "gpt2-medium-owt-adamw": (3.084, 2.821, 2.691),
    "gpt2-large-owt-adamw": (3.013, 2.741, 2.561),
    "gpt2-small-owt-muon": (3.165, 3.006, 2.901),
    "gpt2-medium-owt-muon": (3.009, 2.813, 2.688),
    "gpt2-large-owt-muon": (2.915, 2.691, 2.573),
    "gpt2-small-owt-mars-adamw": (3.108, 2.981, 2.849),
    "gpt2-medium-owt-mars-adamw": (2.969, 2.763, 2.636),
    "gpt2-large-owt-mars-adamw": (2.876, 2.647, 2.518),
    "gpt2-small-owt-mars-adamw-exact": (3.107, 2.980, 2.847),
}

AT_END: Mapping[str, float] = {
    # Table of gamma, small, 50 billion tokens.
    "gpt2-small-owt-mars-adamw-gamma-0.05": 2.871,
    "gpt2-small-owt-mars-adamw-gamma-0.025-to-0.05": 2.872,
    "gpt2-small-owt-mars-adamw-gamma-0.1-to-0": 2.873,
    "gpt2-small-owt-mars-adamw-gamma-0-to-0.1": 2.891,
    "gpt2-small-owt-mars-adamw-gamma-0-to-0.2": 2.899,
    # Figure 6: a lower rate of MARS-AdamW.
    "gpt2-small-owt-mars-adamw-lr-x0.5": 2.852,
    # MARS-M's, read off the plots.
    "gpt2-small-owt-moonlight": 2.8485,
    "gpt2-medium-owt-moonlight": 2.6385,
    "gpt2-large-owt-moonlight": 2.525,
    "gpt2-small-owt-mars-m": 2.841,
    "gpt2-medium-owt-mars-m": 2.6275,
    "gpt2-large-owt-mars-m": 2.520,
    "gpt2-small-owt-mars-m-gamma-0.01": 2.841,
    "gpt2-medium-owt-mars-m-gamma-0.01": 2.624,
    "gpt2-large-owt-mars-m-gamma-0.01": 2.513,
    "gpt2-small-fwe-adamw": 2.892,
    "gpt2-xl-fwe-adamw": 2.4205,
    "gpt2-small-fwe-moonlight": 2.865,
    "gpt2-xl-fwe-moonlight": 2.393,
    "gpt2-small-fwe-mars-m": 2.8545,
    "gpt2-xl-fwe-mars-m": 2.379,
    "gpt2-small-fwe-mars-m-gamma-0.01": 2.850,
    "gpt2-xl-fwe-mars-m-gamma-0.01": 2.378,
}

TABLE_OF_GAMMA = 2.871
"""Gamma 0.025 in the table of gamma, 0.022 above the same setting's main run."""

CIFAR: Mapping[str, tuple[tuple[float, float], tuple[float, float]]] = {
    # Test loss and accuracy in percent of ResNet-18 on CIFAR-10 and on CIFAR-100, 200 epochs.
    "adamw": ((0.230, 94.81), (1.726, 73.70)),
    "lion": ((0.245, 94.68), (1.351, 74.28)),
    "shampoo": ((0.354, 94.65), (2.426, 74.27)),
    "muon": ((0.306, 95.08), (2.608, 74.64)),
    "mars-adamw": ((0.199, 95.29), (0.971, 76.97)),
    "mars-adamw-exact": ((0.193, 95.26), (0.888, 77.38)),
    "mars-lion": ((0.202, 95.05), (0.985, 75.97)),
    "mars-lion-exact": ((0.219, 94.98), (0.991, 76.15)),
    "mars-shampoo": ((0.202, 94.92), (1.256, 74.80)),
    "mars-shampoo-exact": ((0.194, 94.98), (0.982, 75.83)),
}

_SIZES: Mapping[tuple[Any, ...], str] = {
    (12, 12, 768): "small",
    (24, 16, 1024): "medium",
    (36, 20, 1280): "large",
    (48, 25, 1600): "xl",
}
_CORPORA = {"openwebtext": "owt", "fineweb": "fwe"}
_TOLERANCE = 0.03
"""The papers round: their 50B are 49.2B."""
_CIFAR_IMAGES = 200 * 50_000


@dataclass(frozen=True)
class Published:
    """A published final loss, in nats, and where it stands."""

    loss: float
    where: str
    accuracy: float | None = None
    """Of a classifier, in percent."""


def losses(trained: str) -> Mapping[int, float]:
    """Validation loss of a GPT-2 training by tokens; empty where no paper has it."""
    if trained in BY_BUDGET:
        return dict(zip((5 * _BILLION, 20 * _BILLION, 50 * _BILLION), BY_BUDGET[trained], strict=True))
    return {50 * _BILLION: AT_END[trained]} if trained in AT_END else {}


def published(config: Mapping[str, Any], optimizer: str, tokens: float) -> Published | None:
    """What was published for this model, data, optimizer and number of tokens (or images); None where nothing was."""
    task = config.get("task", {})
    model, data = (task.get(part, {}) if isinstance(task.get(part), Mapping) else {} for part in ("model", "data"))
    if "dataset" in data:
        return _of_cifar(model, data, optimizer, tokens)
    size = _SIZES.get((model.get("num_layers"), model.get("num_heads"), model.get("width")))
    # By the name of the token files, which `mars prepare` derives from the source.
    corpus = next((short for part, short in _CORPORA.items() if part in str(data.get("tokens")).lower()), None)
    if size is None or corpus is None or (model.get("context_length"), model.get("vocab_size")) != (1024, 50304):
        return None
    trained = f"gpt2-{size}-{corpus}-{optimizer}{_gamma(config['optimizer'], optimizer)}"
    for budget, loss in losses(trained).items():
        if abs(tokens / budget - 1) < _TOLERANCE:
            where = "MARS paper" if trained in BY_BUDGET or "mars-adamw" in trained else "MARS-M paper, read off a plot"
            return Published(loss, f"{where}: {trained}, {budget // _BILLION}B tokens")
    return None


def _gamma(options: Mapping[str, Any], optimizer: str) -> str:
    """What the recipes' names add where gamma isn't the usual one."""
    gamma, final = options.get("gamma"), options.get("final_gamma")
    if not optimizer.startswith("mars-") or (gamma == 0.025 and final is None):
        return ""
    return f"-gamma-{gamma:g}" if final is None else f"-gamma-{gamma:g}-to-{final:g}"


def _of_cifar(model: Mapping[str, Any], data: Mapping[str, Any], optimizer: str, images: float) -> Published | None:
    is_same = model.get("name") == "resnet18" and model.get("width") == 64
    if not is_same or optimizer not in CIFAR or abs(images / _CIFAR_IMAGES - 1) > _TOLERANCE:
        return None
    loss, accuracy = CIFAR[optimizer][data["dataset"] == "cifar100"]
    return Published(loss, f"MARS paper: ResNet-18, {data['dataset']}, 200 epochs", accuracy)
