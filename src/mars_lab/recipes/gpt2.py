"""The published GPT-2 trainings: four sizes, two corpora, nine optimizers, three budgets.

From the MARS paper (Yuan et al., 2024), its README, and MARS-M (Liu, Yuan and Gu, 2025): 480 x 1024 tokens a step,
100,000 steps, 2,000 of them warm-up, cosine, global clipping at 1, seed 5000, no bias, no dropout, vocabulary 50304,
attention of layer i divided by i + 1.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from mars_lab.data.tokens import DataConfig
from mars_lab.models.gpt2 import GPT2Config
from mars_lab.recipes import baselines
from mars_lab.recipes.recipe import Recipe
from mars_lab.report import published
from mars_lab.tasks.language import LanguageConfig
from mars_lab.training.config import OptimizerConfig, RunConfig, TrainConfig

TOKENS_PER_STEP = 480 * 1024
NUM_STEPS = 100_000
_WARMUP_STEPS = 2000

CorpusName = Literal["owt", "fwe"]
_CORPORA: Mapping[CorpusName, str] = {"owt": "openwebtext", "fwe": "fineweb-edu"}
_BUDGETS = {"5b": 10_000, "20b": 40_000, "50b": NUM_STEPS}


@dataclass(frozen=True)
class Size:
    """A row of the table of hyperparameters; rates are peaks."""

    num_layers: int
    num_heads: int
    width: int
    batch_size: int
    """Sequences in one pass of eight GPUs of 80 GB."""
    adamw_lr: float
    muon_lr: float
    mars_lr: float
    lr_1d: float
    min_lr: float
    mars_m_lr: Mapping[CorpusName, float]


SIZES = {
    "small": Size(12, 12, 768, 120, 6e-4, 2e-2, 6e-3, 3e-3, 3e-5, {"owt": 6e-3, "fwe": 1e-2}),
    "medium": Size(24, 16, 1024, 120, 3e-4, 1e-2, 3e-3, 1.5e-3, 6e-5, {"owt": 5e-3, "fwe": 5e-3}),
    "large": Size(36, 20, 1280, 40, 2e-4, 6.67e-3, 2e-3, 1e-3, 1e-5, {"owt": 5e-3, "fwe": 5e-3}),
    # No Muon, and no MARS-M on OpenWebText, was published at this size: the rates of `large`.
    "xl": Size(48, 25, 1600, 40, 2e-4, 6.67e-3, 2e-3, 1e-3, 1e-5, {"owt": 5e-3, "fwe": 3e-3}),
}

_FIRST_STEP = "the first gradient is corrected as if the one before had been 0, as in the authors' code"
_DECAY_1D = "norms and biases decay by 0.1 whatever the group says, as in the authors' code"
_UNPUBLISHED_RATE = "no rate was published for this optimizer here; tune it before comparing"


def base(size: Size, corpus: CorpusName, optimizer: OptimizerConfig) -> RunConfig:
    """A training of 100,000 steps on eight GPUs."""
    model = GPT2Config(size.num_layers, size.num_heads, size.width, context_length=1024, vocab_size=50304)
    task = LanguageConfig(
        model,
        DataConfig(tokens=f"data/{_CORPORA[corpus]}"),
        eval_sequences=3000,
        sample_prompt="The",
    )
    # The lowest rates are AdamW's and MARS-AdamW's; Lion's are a tenth of them throughout.
    adamw_like_lr = optimizer.lr * (10 if optimizer.name == "mars-lion" else 1)
    train = TrainConfig(
        num_steps=NUM_STEPS,
        batch_size=size.batch_size,
        num_accumulation_steps=480 // size.batch_size,
        warmup_fraction=_WARMUP_STEPS / NUM_STEPS,
        final_lr_ratio=size.min_lr / adamw_like_lr,
        precision="bf16",
        compile=True,
        seed=5000,
        eval_every=1000,
        checkpoint_every=1000,
    )
    return RunConfig(task, optimizer, train)


def _mars(size: Size, name: Literal["mars-adamw", "mars-lion", "mars-shampoo"], lr: float) -> OptimizerConfig:
    return OptimizerConfig(name, lr=lr, lr_1d=size.lr_1d, weight_decay=0.01, weight_decay_1d=0.1, first_step="zero")


def optimizers(size: Size, corpus: CorpusName) -> Mapping[str, OptimizerConfig]:
    """The nine optimizers of the papers, by their names in recipes."""
    mars_m_lr = size.mars_m_lr[corpus]
    mars_m = OptimizerConfig("mars-m", lr=mars_m_lr, weight_decay=0.01, weight_decay_1d=0.01, first_step="zero")
    return {
        "adamw": baselines.adamw(size.adamw_lr, weight_decay=0.1),
        "muon": baselines.muon(size.muon_lr, size.lr_1d),
        "moonlight": baselines.moonlight(mars_m_lr, mars_m_lr, weight_decay=0.1),
        "lion": baselines.lion(size.adamw_lr / 10, size.adamw_lr, weight_decay=1.0),
        "shampoo": baselines.shampoo(5 * size.muon_lr, size.lr_1d, weight_decay=0.01),
        "mars-adamw": _mars(size, "mars-adamw", size.mars_lr),
        "mars-lion": _mars(size, "mars-lion", size.mars_lr / 10),
        "mars-shampoo": _mars(size, "mars-shampoo", size.muon_lr),
        "mars-m": mars_m,
    }


_TITLES = {
    "adamw": "AdamW",
    "muon": "Muon",
    "moonlight": "Muon (Moonlight)",
    "lion": "Lion",
    "shampoo": "Shampoo",
    "mars-adamw": "MARS-AdamW",
    "mars-lion": "MARS-Lion",
    "mars-shampoo": "MARS-Shampoo",
    "mars-m": "MARS-M",
}

_DEPARTURES: Mapping[str, tuple[str, ...]] = {
    "adamw": (),
    "muon": (
        "the rate is held and falls to 0 in the last 2,000 steps, as in the authors' train_muon.py, whatever their "
        "configuration says",
        "embeddings get AdamW, as torch.optim.Muon asks; the authors' code orthogonalises them",
    ),
    "moonlight": ("the rates are those of MARS-M; the table gives none for it",),
    "lion": (
        "norms and biases get AdamW",
        _UNPUBLISHED_RATE + " (a tenth of AdamW's, with ten times its decay, as Chen et al., 2023, advise)",
    ),
    "shampoo": (
        "embeddings, norms and biases get AdamW",
        _UNPUBLISHED_RATE + " (five times Muon's: accumulated preconditioners make steps shorter with time)",
    ),
    "mars-adamw": (_FIRST_STEP, _DECAY_1D),
    "mars-lion": (_FIRST_STEP, _DECAY_1D, _UNPUBLISHED_RATE),
    "mars-shampoo": (_FIRST_STEP, _DECAY_1D, _UNPUBLISHED_RATE + " (Muon's)"),
    "mars-m": (
        _FIRST_STEP,
        "decay 0.01 on everything, as in the authors' configuration; their table says 0.1, which Moonlight has",
    ),
}


def recipes() -> Mapping[str, Recipe]:
    """All of them, by name."""
    return {
        name: recipe
        for size in SIZES
        for corpus in _CORPORA
        for optimizer in _DEPARTURES
        for name, recipe in _variants(size, corpus, optimizer)
    }


def _variants(size_name: str, corpus: CorpusName, optimizer: str) -> Iterator[tuple[str, Recipe]]:
    """The training of 50 billion tokens, then what differs from it in one or two fields."""
    name = f"gpt2-{size_name}-{corpus}-{optimizer}"

    def at_50b() -> RunConfig:
        size = SIZES[size_name]
        config = base(size, corpus, optimizers(size, corpus)[optimizer])
        if optimizer == "muon":
            train = replace(config.train, schedule="wsd", decay_fraction=_WARMUP_STEPS / NUM_STEPS, final_lr_ratio=0.0)
            return replace(config, train=train)
        return config

    recipe = _described(name, Recipe(at_50b, ""), size_name, corpus, optimizer)
    yield name, recipe
    if optimizer.startswith("mars-"):
        exact = replace(
            recipe, make=lambda: exactly(recipe.config), about=f"{recipe.summary[:-1]}, exact mode.\n{recipe.about}"
        )
        yield f"{name}-exact", replace(exact, published=published.losses(f"{name}-exact"))
    for budget in ("5b", "20b"):
        yield f"{name}-{budget}", _of_budget(recipe, budget)
    if corpus == "fwe":
        for schedule in ("constant", "wsd"):
            yield f"{name}-{schedule}", _of_schedule(recipe, schedule)
    for final_gamma, gamma in _gammas(name):
        suffix = f"{gamma:g}" if final_gamma is None else f"{gamma:g}-to-{final_gamma:g}"
        yield f"{name}-gamma-{suffix}", _of_gamma(recipe, f"{name}-gamma-{suffix}", gamma, final_gamma)
    if name in ("gpt2-small-owt-adamw", "gpt2-small-owt-mars-adamw"):
        for factor in (0.25, 0.5, 2.0, 4.0, *([5.0] if optimizer == "adamw" else [])):
            yield f"{name}-lr-x{factor:g}", _of_rate(recipe, f"{name}-lr-x{factor:g}", factor)
    if optimizer == "mars-m":
        yield f"{name}-decay-0.1", _of_decay(recipe)


def _described(name: str, recipe: Recipe, size: str, corpus: CorpusName, optimizer: str) -> Recipe:
    about = (
        f"GPT-2 {size} on {_CORPORA[corpus]}, {_TITLES[optimizer]}, 50 billion tokens.\n"
        "Hyperparameters: the tables of the authors' README for MARS and for MARS-M."
    )
    return replace(
        recipe,
        about=about,
        published=published.losses(name),
        hardware="8 GPUs of 80 GB",
        departures=_DEPARTURES[optimizer],
    )


def _gammas(name: str) -> tuple[tuple[float | None, float], ...]:
    """(gamma at the end or None, gamma) of the studies of it."""
    if name == "gpt2-small-owt-mars-adamw":
        return (None, 0.05), (0.05, 0.025), (0.0, 0.1), (0.1, 0.0), (0.2, 0.0)
    return ((None, 0.01),) if name.endswith("-mars-m") else ()


def _of_gamma(recipe: Recipe, name: str, gamma: float, final_gamma: float | None) -> Recipe:
    def make() -> RunConfig:
        return _with_optimizer(recipe.config, gamma=gamma, final_gamma=final_gamma)

    what = f"gamma {gamma:g}" if final_gamma is None else f"gamma from {gamma:g} to {final_gamma:g} in equal steps"
    about = f"{recipe.summary[:-1]}, {what}.\n{recipe.about}"
    return replace(recipe, make=make, about=about, published=published.losses(name))


def _of_budget(recipe: Recipe, budget: str) -> Recipe:
    num_steps = _BUDGETS[budget]

    def make() -> RunConfig:
        config = recipe.config
        fractions = {"warmup_fraction": _WARMUP_STEPS / num_steps}
        if config.train.schedule == "wsd":
            fractions["decay_fraction"] = _WARMUP_STEPS / num_steps
        return replace(config, train=replace(config.train, num_steps=num_steps, **fractions))

    billions = budget.removesuffix("b")
    about = (
        f"{recipe.summary.replace('50 billion', f'{billions} billion')}\n"
        f"The whole schedule in {billions} billion tokens. The papers' figures at this many seem to be points of the "
        "longer runs, before their rates have fallen: compare those with the curve of the recipe without this ending."
    )
    return replace(recipe, make=make, about=about, published={})


def _of_schedule(recipe: Recipe, schedule: Literal["constant", "wsd"]) -> Recipe:
    def make() -> RunConfig:
        config = recipe.config
        return replace(config, train=replace(config.train, schedule=schedule, decay_fraction=0.2, final_lr_ratio=0.0))

    what = "constant rate" if schedule == "constant" else "constant rate, then linear to 0 over the last fifth"
    return replace(recipe, make=make, about=f"{recipe.summary[:-1]}, {what}.\n{recipe.about}", published={})


def _of_rate(recipe: Recipe, name: str, factor: float) -> Recipe:
    def make() -> RunConfig:
        config = recipe.config
        lr_1d = None if config.optimizer.lr_1d is None else config.optimizer.lr_1d * factor
        return _with_optimizer(config, lr=config.optimizer.lr * factor, lr_1d=lr_1d)

    about = (
        f"{recipe.summary[:-1]}, {factor:g} times the rate.\nThe study of the learning rate. The paper has "
        f"AdamW at 3e-3 (x5) and MARS-AdamW at 3e-3 (x0.5); the other powers of 2 are ours.\n{recipe.about}"
    )
    return replace(recipe, make=make, about=about, published=published.losses(name))


def _of_decay(recipe: Recipe) -> Recipe:
    """MARS-M at the decay of its table of hyperparameters, which is Moonlight's."""

    def make() -> RunConfig:
        return _with_optimizer(recipe.config, weight_decay=0.1)

    about = (
        f"{recipe.summary[:-1]}, decay 0.1.\nThe decay of matrices and embeddings in the authors' table, and "
        f"Moonlight's; their configuration has 0.01. Nobody has published the comparison.\n{recipe.about}"
    )
    departures = (_FIRST_STEP, "decay 0.1 of matrices and embeddings, as in the authors' table")
    return replace(recipe, make=make, about=about, published={}, departures=departures)


def exactly(config: RunConfig) -> RunConfig:
    """The same in exact mode."""
    return _with_optimizer(config, mode="exact")


def _with_optimizer(config: RunConfig, **changes: object) -> RunConfig:
    return replace(config, optimizer=replace(config.optimizer, **changes))
