"""The published image classifications: ResNet-18 and the small CNN on CIFAR-10 and CIFAR-100.

From the MARS paper and the authors' `train_CV.py`: 200 epochs in batches of 128, images shifted and mirrored, the
rate divided by ten after 100 and 150 epochs, decay 5e-4, the rate of each optimizer from the grid 1e-5 ... 1e-1. The
rates chosen were not published; those here are where a grid should be centred.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Literal

from mars_lab.models.images import ImageModelConfig
from mars_lab.recipes import baselines
from mars_lab.recipes.recipe import Recipe
from mars_lab.report import published
from mars_lab.tasks.vision import ImageDataConfig, VisionConfig
from mars_lab.training.config import OptimizerConfig, RunConfig, TrainConfig

NUM_IMAGES = 50_000
BATCH_SIZE = 128
NUM_EPOCHS = 200
_DECAY = 5e-4

LR_GRID = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)

_ADAMW_LR = 1e-3
_POLAR_LR = 2e-2
_SHAMPOO_LR = 1e-1  # the highest of the grid: accumulated preconditioners make steps shorter with the square root of t

_BASELINES: Mapping[str, OptimizerConfig] = {
    "adamw": replace(baselines.adamw(_ADAMW_LR, _DECAY), betas=(0.9, 0.999)),
    "lion": baselines.lion(1e-4, _ADAMW_LR, _DECAY),
    "shampoo": baselines.shampoo(_SHAMPOO_LR, _ADAMW_LR, _DECAY),
    "muon": baselines.muon_of_convolutions(_POLAR_LR, _ADAMW_LR, _DECAY),
}
_MARS: Mapping[str, OptimizerConfig] = {
    "mars-adamw": OptimizerConfig("mars-adamw", lr=3e-3, weight_decay=_DECAY),
    "mars-lion": OptimizerConfig("mars-lion", lr=3e-4, lr_1d=3e-3, weight_decay=_DECAY),
    "mars-shampoo": OptimizerConfig("mars-shampoo", lr=_POLAR_LR, lr_1d=3e-3, weight_decay=_DECAY),
    "mars-m": OptimizerConfig("mars-m", lr=3e-3, weight_decay=_DECAY),
}
OPTIMIZERS: Mapping[str, OptimizerConfig] = {
    name: replace(optimizer, max_grad_norm=None) for name, optimizer in (_BASELINES | _MARS).items()
}

_IS_POINT = "the point of MARS that equals it, since torch.optim.Muon takes matrices only (tests/test_identities.py)"
_SCRIPT = "the authors' released script leaves convolutions to AdamW, so it can't have given the published figure"
_MATRICES = "convolutions are matrices (out, in * 9)"
_DEPARTURES: Mapping[str, tuple[str, ...]] = {
    "adamw": (),
    "lion": ("norms and biases get AdamW",),
    "shampoo": ("which Shampoo the published figure is of was not said; norms and biases get AdamW",),
    "muon": (_IS_POINT,),
    "mars-adamw": (_SCRIPT,),
    "mars-lion": (_SCRIPT,),
    "mars-shampoo": (_MATRICES, _SCRIPT),
    "mars-m": (_MATRICES, "no figure was published"),
}


def recipes() -> Mapping[str, Recipe]:
    """All of them, by name."""
    return {
        name: recipe
        for dataset in ("cifar10", "cifar100")
        for model in ("resnet18", "cnn")
        for optimizer in OPTIMIZERS
        for name, recipe in _variants(dataset, model, optimizer)
    }


def _variants(
    dataset: Literal["cifar10", "cifar100"], model: Literal["resnet18", "cnn"], optimizer: str
) -> Iterator[tuple[str, Recipe]]:
    for mode in ("approx", "exact") if optimizer in _MARS else ("approx",):
        suffix = "-exact" if mode == "exact" else ""
        figures = published.CIFAR.get(optimizer + suffix) if model == "resnet18" else None
        loss, accuracy = figures[dataset == "cifar100"] if figures else (None, None)
        yield (
            f"{dataset}-{model}-{optimizer}{suffix}",
            Recipe(
                lambda m=mode: _config(dataset, model, replace(OPTIMIZERS[optimizer], mode=m)),
                f"{dataset.upper().replace('CIFAR', 'CIFAR-')}, {model}, {optimizer}{suffix}, 200 epochs.\n"
                "Table of the vision experiments. Tune the rate over 1e-5 ... 1e-1, as the authors did.",
                published={} if loss is None else {NUM_EPOCHS * NUM_IMAGES: loss},
                published_accuracy=accuracy,
                hardware="one GPU, half an hour",
                departures=_DEPARTURES[optimizer],
            ),
        )


def _config(
    dataset: Literal["cifar10", "cifar100"], model: Literal["resnet18", "cnn"], optimizer: OptimizerConfig
) -> RunConfig:
    width, dropout = (64, 0.0) if model == "resnet18" else (32, 0.2)
    task = VisionConfig(ImageModelConfig(model, width, dropout), ImageDataConfig(dataset, f"data/{dataset}"))
    per_epoch = NUM_IMAGES / BATCH_SIZE
    train = TrainConfig(
        num_steps=round(NUM_EPOCHS * per_epoch),
        batch_size=BATCH_SIZE,
        schedule="multistep",
        warmup_fraction=0.0,
        eval_every=round(per_epoch),
        checkpoint_every=round(5 * per_epoch),
    )
    return RunConfig(task, optimizer, train)
