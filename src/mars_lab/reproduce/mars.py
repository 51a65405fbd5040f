"""The tables and figures of the MARS paper (Yuan et al.), by the numbers of its first version on arXiv, and of its
README, which has what later versions added.

The numbers that later versions gave to those are not at hand; they go by what they show.
"""

from collections.abc import Iterator, Sequence

from mars_lab.evaluation.published import PUBLISHED
from mars_lab.evaluation.suite import NINE
from mars_lab.recipes import cifar
from mars_lab.report import published
from mars_lab.reproduce.exhibit import (
    BUDGETS,
    MEAN,
    Accuracy,
    Exhibit,
    Loss,
    Quantity,
    Row,
    StepTime,
    TaskAccuracy,
    Unreproducible,
)

_BEST, _TIME, _HELLASWAG = Loss(), StepTime(), TaskAccuracy("hellaswag")
_NINE = (*(TaskAccuracy(task.name) for task in NINE), TaskAccuracy(MEAN))
_SIZES = {"small": 1, "medium": 2, "large": 3}


def exhibits() -> Iterator[Exhibit]:
    """All that can be run."""
    yield from (_owt(size, number) for size, number in _SIZES.items())
    yield from _openwebtext()
    yield from _types()
    yield from _studies()
    yield from _fineweb_edu()
    for dataset in ("cifar10", "cifar100"):
        yield from (_cifar(dataset, model) for model in ("resnet18", "cnn"))


UNREPRODUCIBLE = (
    Unreproducible("mars/shapes", "MARS paper, Table 2", "sizes of the models; `mars recipes show` has them"),
    Unreproducible("mars/settings", "MARS paper, Table 3", "settings of every run; `mars recipes show` has them"),
    *(
        Unreproducible(
            f"mars/rates-{size}",
            f"MARS paper, Table {number + 3}; README, hyperparameters",
            f"rates of the runs: `mars recipes show gpt2-{size}-owt-mars-adamw`",
        )
        for size, number in _SIZES.items()
    ),
    Unreproducible("mars/algorithms", "MARS paper, Algorithms 1 to 4", "no measurement: docs/optimizer.md"),
    Unreproducible(
        "mars/sophia",
        "MARS paper, section 4.2",
        "2.901 and 2.875 of Sophia-H and Sophia-G are quoted from another paper; no such optimizer here",
    ),
)


def final(recipe: str, quantity: Quantity = _BEST, label: str = "") -> Row:
    """A row with the figure that was published of the recipe at the end, if one was."""
    figures = list(published.losses(recipe).values())
    return Row(recipe, {quantity: figures[-1]} if figures else {}, label)


def _owt(size: str, number: int) -> Exhibit:
    base = f"gpt2-{size}-owt-"
    optimizers = ["adamw", "muon", "mars-adamw", *(["mars-adamw-exact"] if size == "small" else [])]
    rows = (Row(base + o, dict(zip(BUDGETS, published.BY_BUDGET[base + o], strict=True))) for o in optimizers)
    return Exhibit(
        f"mars/owt-{size}",
        f"MARS paper, Figure {number}; README, best validation loss and efficiency",
        f"GPT-2 {size} on OpenWebText: training and validation loss against tokens and time, at 5, 20 and 50B tokens",
        tuple(rows),
        (*BUDGETS, _TIME),
        said=((_TIME, f"{base}adamw", f"{base}mars-adamw"), (_TIME, f"{base}mars-adamw", f"{base}muon")),
        note="The time of a step depends on the machine and what else it does.",
    )


def _openwebtext() -> Iterator[Exhibit]:
    yield Exhibit(
        "mars/owt-hellaswag",
        "MARS paper, Figure 4",
        "HellaSwag, 0-shot, of GPT-2 medium and large on OpenWebText",
        tuple(
            _of_tasks(f"gpt2-{size}-owt-{optimizer}", f"GPT-2 {size}, {title}, OpenWebText 50B", f"{size}, {title}")
            for size in ("medium", "large")
            for optimizer, title in (("adamw", "AdamW"), ("muon", "Muon"), ("mars-adamw", "MARS-AdamW"))
        ),
        (_HELLASWAG,),
        said=tuple(
            (_HELLASWAG, f"gpt2-{size}-owt-mars-adamw", f"gpt2-{size}-owt-{other}")
            for size, other in (("medium", "adamw"), ("medium", "muon"), ("large", "muon"))
        ),
        tasks=("hellaswag",),
    )
    sizes = ("small", "medium")
    yield Exhibit(
        "mars/exact-and-approx",
        "MARS paper, Figure 5",
        "exact and approx mode of MARS-AdamW, GPT-2 small and medium on OpenWebText",
        tuple(final(f"gpt2-{size}-owt-mars-adamw{mode}") for size in sizes for mode in ("", "-exact")),
        (_BEST, _TIME),
        said=((_BEST, "gpt2-medium-owt-mars-adamw-exact", "gpt2-medium-owt-mars-adamw"),),
        note="Exact mode computes two gradients a step.",
    )


def _types() -> Iterator[Exhibit]:
    small, mars = "gpt2-small-owt-", "gpt2-small-owt-mars-adamw"
    yield Exhibit(
        "mars/owt-small-lion",
        "MARS paper, Figure 7",
        "MARS-AdamW against MARS-Lion and Lion, GPT-2 small on OpenWebText",
        (final(mars), final(f"{small}mars-lion"), final(f"{small}lion")),
        said=((_BEST, mars, f"{small}mars-lion"),),
        note="The figure's caption says Lion, the text MARS-Lion; both are here.",
    )
    yield Exhibit(
        "mars/owt-small-shampoo",
        "MARS paper, section 3.2.3 (no figure at hand)",
        "MARS-Shampoo against Shampoo, Muon and MARS-AdamW, GPT-2 small on OpenWebText",
        tuple(final(small + name) for name in ("mars-shampoo", "shampoo", "muon", "mars-adamw")),
    )


def _studies() -> Iterator[Exhibit]:
    adamw, mars = "gpt2-small-owt-adamw", "gpt2-small-owt-mars-adamw"
    late = (Loss(0.74, "37B"), _BEST)
    yield Exhibit(
        "mars/learning-rates",
        "MARS paper, Figure 6",
        "AdamW at 6e-4 and 3e-3, MARS-AdamW at 3e-3, GPT-2 small on OpenWebText",
        (final(adamw), Row(f"{adamw}-lr-x5"), final(f"{mars}-lr-x0.5")),
        late,
        said=(
            (late[0], adamw, f"{adamw}-lr-x5"),
            (_BEST, f"{adamw}-lr-x5", adamw),
            (_BEST, f"{mars}-lr-x0.5", f"{adamw}-lr-x5"),
        ),
    )
    yield Exhibit(
        "mars/learning-rate-grid",
        "MARS paper, section B.1 (the grid is ours)",
        "AdamW and MARS-AdamW over learning rates, GPT-2 small on OpenWebText",
        tuple(final(base + factor) for base in (adamw, mars) for factor in _factors(("0.25", "0.5", "", "2", "4"))),
        note="Published are the rates that the other tables use, and MARS-AdamW at half of its own.",
        draws_rates=True,
    )
    gammas = ("0.05", "0.025-to-0.05", "0.1-to-0", "0-to-0.1", "0-to-0.2")
    yield Exhibit(
        "mars/gamma",
        "MARS paper, Table 1",
        "gamma, constant and changing, of MARS-AdamW, GPT-2 small on OpenWebText",
        (
            Row(mars, {_BEST: published.TABLE_OF_GAMMA}, "gamma 0.025"),
            *(final(f"{mars}-gamma-{g}", label=f"gamma {g.replace('-', ' ')}") for g in gammas),
        ),
    )


def _factors(values: Sequence[str]) -> list[str]:
    return [f"-lr-x{value}" if value else "" for value in values]


def _fineweb_edu() -> Iterator[Exhibit]:
    for size in ("small", "xl"):
        base = f"gpt2-{size}-fwe-"
        adamw, mars = f"{base}adamw", f"{base}mars-adamw"
        yield Exhibit(
            f"mars/fwe-{size}",
            "README, FineWeb-Edu: training and validation loss",
            f"GPT-2 {size} on FineWeb-Edu: training and validation loss",
            (final(adamw), final(mars)),
            said=((_BEST, mars, adamw),),
            note="AdamW's figure is read off a plot of the MARS-M paper.",
        )
        title = f"GPT-2 {'XL' if size == 'xl' else size}"
        yield Exhibit(
            f"mars/fwe-{size}-tasks",
            f"README, evaluation metrics: HellaSwag plot, table of {title}",
            f"nine tasks, 0-shot, {title} on FineWeb-Edu",
            (
                _of_tasks(adamw, f"{title}, AdamW, FineWeb-Edu 50B"),
                _of_tasks(mars, f"{title}, MARS-AdamW, FineWeb-Edu 50B"),
                _of_tasks("", f"{title}, OpenAI", f"{title}, OpenAI"),
            ),
            _NINE,
            tasks=("nine",),
        )
    base = "gpt2-small-fwe-"
    names = [f"{base}{o}{schedule}" for schedule in ("", "-constant", "-wsd") for o in ("adamw", "mars-adamw")]
    yield Exhibit(
        "mars/schedules",
        "MARS paper, later versions (number and figures not at hand)",
        "cosine, constant and WSD schedules, GPT-2 small on FineWeb-Edu",
        tuple(final(name) for name in names),
        said=tuple((_BEST, names[i + 1], names[i]) for i in (0, 2, 4)),
        note="That MARS-AdamW is before AdamW is what the paper says of its experiments on FineWeb-Edu as a whole.",
    )


def _of_tasks(recipe: str, title: str, label: str = "") -> Row:
    figures: dict[Quantity, float] = {TaskAccuracy(task): value for task, value in PUBLISHED.get(title, {}).items()}
    mean = {TaskAccuracy(MEAN): sum(figures.values()) / len(NINE)} if len(figures) == len(NINE) else {}
    return Row(recipe, figures | mean, label)


def _cifar(dataset: str, model: str) -> Exhibit:
    base = f"{dataset}-{model}-"
    rows: list[Row] = []
    for optimizer in cifar.OPTIMIZERS:
        if optimizer == "mars-m":
            continue
        for name in (optimizer, f"{optimizer}-exact") if optimizer.startswith("mars-") else (optimizer,):
            figures = published.CIFAR.get(name) if model == "resnet18" else None
            pair = figures[dataset == "cifar100"] if figures else ()
            rows.append(Row(base + name, dict(zip((_BEST, Accuracy()), pair, strict=False))))
    title = dataset.upper().replace("CIFAR", "CIFAR-")
    return Exhibit(
        f"mars/{dataset}-{model}",
        f"README, vision tasks: loss and accuracy on {title}"
        if model == "resnet18"
        else "authors' train_CNN.py (figures not at hand)",
        f"{'ResNet-18' if model == 'resnet18' else 'a small CNN'} on {title}: test loss and accuracy",
        tuple(rows),
        (_BEST, Accuracy()),
        note="Rates were not published: tune them (--num-lrs) before comparing.",
    )
