"""Final losses that were published, for runs of the same model on the same data.

MARS paper (arXiv:2411.10438): OpenWebText, validation loss of the last evaluation. MARS-M paper: read off its plots
(about 0.003), AdamW and Moonlight as there. Both with 480 x 1024 tokens a step.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_MODELS: dict[tuple[Any, ...], str] = {
    (12, 12, 768): "small",
    (24, 16, 1024): "medium",
    (36, 20, 1280): "large",
    (48, 25, 1600): "XL",
}
_TOKENS = {5e9: "5B", 20e9: "20B", 50e9: "50B"}
_TOLERANCE = 0.03
"""The papers round: their 50B are 49.2B."""
_DATA = {"openwebtext": "OpenWebText", "fineweb": "FineWeb-Edu"}


@dataclass(frozen=True)
class Published:
    """A published final validation loss, in nats per token, and where it stands."""

    loss: float
    where: str


_MARS_PAPER = {
    "adamw": {
        "50B": {"small": 2.885, "medium": 2.691, "large": 2.561},
        "20B": {"small": 3.024, "medium": 2.821, "large": 2.741},
        "5B": {"small": 3.193, "medium": 3.084, "large": 3.013},
    },
    "muon": {
        "50B": {"small": 2.901, "medium": 2.688, "large": 2.573},
        "20B": {"small": 3.006, "medium": 2.813, "large": 2.691},
        "5B": {"small": 3.165, "medium": 3.009, "large": 2.915},
    },
    "mars-adamw": {
        "50B": {"small": 2.849, "medium": 2.636, "large": 2.518},
        "20B": {"small": 2.981, "medium": 2.763, "large": 2.647},
        "5B": {"small": 3.108, "medium": 2.969, "large": 2.876},
    },
    "mars-adamw-exact": {"50B": {"small": 2.847}},
}
_MARS_M_PAPER = {
    "OpenWebText": {
        0.025: {"small": 2.841, "medium": 2.6275, "large": 2.520},
        0.01: {"small": 2.841, "medium": 2.624, "large": 2.513},
    },
    "FineWeb-Edu": {0.025: {"small": 2.8545, "XL": 2.379}, 0.01: {"small": 2.850, "XL": 2.378}},
}
_ADAMW_FINEWEB = {"small": 2.892, "XL": 2.4205}


def published(config: Mapping[str, Any], optimizer: str, tokens: float) -> Published | None:
    """What was published for this model, data, optimizer and number of tokens; None where nothing was."""
    size, data = _model(config), _data(config)
    budget = next((name for count, name in _TOKENS.items() if abs(tokens / count - 1) < _TOLERANCE), None)
    if size is None or data is None or budget is None:
        return None
    loss, paper = None, "MARS paper"
    if data == "OpenWebText":
        loss = _MARS_PAPER.get(optimizer, {}).get(budget, {}).get(size)
    elif optimizer == "adamw" and budget == "50B":
        loss, paper = _ADAMW_FINEWEB.get(size), "MARS-M paper, read off a plot"
    if optimizer == "mars-m" and budget == "50B":
        loss = _MARS_M_PAPER[data].get(config["optimizer"]["gamma"], {}).get(size)
        paper = "MARS-M paper, read off a plot"
    return None if loss is None else Published(loss, f"{paper}: GPT-2 {size}, {data}, {budget} tokens")


def _model(config: Mapping[str, Any]) -> str | None:
    model = config.get("task", {}).get("model", {})
    if not isinstance(model, Mapping) or model.get("context_length") != 1024 or model.get("vocab_size") != 50304:
        return None
    return _MODELS.get((model.get("num_layers"), model.get("num_heads"), model.get("width")))


def _data(config: Mapping[str, Any]) -> str | None:
    """By the name of the token files, which `mars prepare` derives from the source."""
    data = config.get("task", {}).get("data", {})
    source = data.get("tokens") if isinstance(data, Mapping) else None
    return next((name for part, name in _DATA.items() if part in str(source).lower()), None)
