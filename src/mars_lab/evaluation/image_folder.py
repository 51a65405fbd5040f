"""An image classifier as a folder: `model.safetensors`, and `config.json` with what else using the weights takes."""

import json
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from mars_lab.data import cifar
from mars_lab.evaluation.new_folder import new_folder
from mars_lab.tasks.vision import DEVIATION, MEAN, VisionTask

_INPUT = "float32 (batch, 3, height, width): red, green, blue; (pixel / 255 - mean) / std by channel"


def write(path: Path, model: nn.Module, task: VisionTask) -> None:
    """Make the folder `path`, whole or not at all.

    Raises:
        InputError: there is something at `path`.
    """
    config = {
        "architecture": asdict(task.config.model),
        "classes": list(task.class_names),
        "dataset": task.config.data.dataset,
        "image_size": cifar.SIZE,
        "input": _INPUT,
        "normalisation": {"mean": list(MEAN), "std": list(DEVIATION)},
    }
    with new_folder(path) as partial:
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        weights = {name: value.contiguous() for name, value in model.state_dict().items()}
        save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
