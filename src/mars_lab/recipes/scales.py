"""The published recipes made smaller, by one rule for all of them.

Of a language model, layers, heads and width are divided, the context length too, and the text is the books corpus.
The peak rates are multiplied by the divisor of the width (from small to large the published rates of AdamW, Muon and
MARS-AdamW fall faster than the width grows, those of MARS-M slower); decays, momenta, clipping, gamma and the schedule
stay. Warm-up takes a tenth of the steps, because 2% of a short run is too short. Of a classifier, the width and the
number of epochs are divided; rates stay, since batches do.

A rule like this gives a place to begin: compare optimizers with rates tuned around it (`mars sweep`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from mars_lab.data.tokens import DataConfig
from mars_lab.recipes.cifar import BATCH_SIZE, NUM_IMAGES
from mars_lab.tasks.language import LanguageConfig
from mars_lab.tasks.vision import VisionConfig
from mars_lab.training.config import RunConfig


@dataclass(frozen=True)
class Scale:
    """Divisors of a recipe, and what a step and a run are then."""

    hardware: str
    layers: int
    width: int
    """Also divides the number of heads; multiplies the peak rates of language models."""
    context: int
    steps: int
    batch_size: int
    """Sequences in a step."""
    data: DataConfig
    vocab_size: int
    num_epochs: float
    """Of classifiers."""
    image_width: int
    """Divides the width of classifiers."""
    eval_sequences: int = 256
    eval_images: int = 0
    """0 means all."""


_BOOKS = DataConfig(tokens="data/books")  # as `mars prepare books PATH` leaves them
_FEW_BOOKS = DataConfig(corpus="data/text/books", max_characters=20_000_000)

_SPEECHES = DataConfig(tokenizer_size=512, max_characters=200_000)

SCALES: Mapping[str, Scale] = {
    # GPT-2 small becomes 1.3M parameters, 0.5M tokens.
    "cpu": Scale(
        "2 CPU cores, minutes",
        3,
        6,
        8,
        800,
        32,
        _FEW_BOOKS,
        4096,
        2,
        4,
    ),
    # 30M parameters, 66M tokens.
    "gpu-minutes": Scale("one GPU, minutes", 2, 2, 2, 50, 64, _BOOKS, 50304, 20, 1),
    # GPT-2 small itself, 490M tokens: ten epochs.
    "gpu-hour": Scale("one GPU, an hour", 1, 1, 1, 20, 96, _BOOKS, 50304, 200, 1),
    # Five steps of a thing too small to learn: whether everything fits together.
    "smoke": Scale("one CPU core, a second", 6, 24, 16, 20_000, 4, _SPEECHES, 512, 0.01, 16, 8, 100),
}


def scaled(config: RunConfig, scale: Scale) -> RunConfig:
    """`config` at `scale`."""
    if isinstance(config.task, VisionConfig):
        return _scaled_vision(config, config.task, scale)
    return _scaled_language(config, config.task, scale)


def _scaled_language(config: RunConfig, task: LanguageConfig, scale: Scale) -> RunConfig:
    width = task.model.width // scale.width
    model = replace(
        task.model,
        num_layers=task.model.num_layers // scale.layers,
        num_heads=_divisor(width, task.model.num_heads // scale.width),
        width=width,
        context_length=task.model.context_length // scale.context,
        vocab_size=scale.vocab_size,
    )
    lr_1d = config.optimizer.lr_1d
    optimizer = replace(
        config.optimizer,
        lr=config.optimizer.lr * scale.width,
        lr_1d=None if lr_1d is None else lr_1d * scale.width,
    )
    num_steps = max(2, config.train.num_steps // scale.steps)
    train = replace(
        config.train,
        num_steps=num_steps,
        batch_size=scale.batch_size,
        num_accumulation_steps=1,
        warmup_fraction=0.1,
        precision="auto",
        compile=scale.layers == 1,
        seed=0,
        eval_every=max(1, num_steps // 8),
        checkpoint_every=max(1, num_steps // 4),
    )
    task = replace(task, model=model, data=scale.data, eval_sequences=scale.eval_sequences)
    return RunConfig(task, optimizer, train)


def _divisor(width: int, wanted: int) -> int:
    """The number of heads nearest to `wanted` that divides `width`."""
    return min((n for n in range(1, width + 1) if width % n == 0), key=lambda n: abs(n - wanted))


def _scaled_vision(config: RunConfig, task: VisionConfig, scale: Scale) -> RunConfig:
    per_epoch = round(NUM_IMAGES / BATCH_SIZE)
    num_steps = round(scale.num_epochs * per_epoch)
    eval_every = per_epoch // 4 if scale.num_epochs < 10 else per_epoch
    train = replace(config.train, num_steps=num_steps, eval_every=min(eval_every, num_steps))
    model = replace(task.model, width=task.model.width // scale.image_width)
    evaluated = {"eval_images": scale.eval_images, "eval_train_images": scale.eval_images or task.eval_train_images}
    return replace(config, task=replace(task, model=model, **evaluated), train=train)
