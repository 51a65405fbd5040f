"""The tables and figures of the MARS-M paper (Liu, Yuan and Gu), by what they show: its figures are read off the plots
of the authors' README, and the paper's own numbers are not at hand.
"""

from collections.abc import Iterator

from mars_lab.evaluation.suite import NINE
from mars_lab.report import published
from mars_lab.reproduce.exhibit import MEAN, Accuracy, Exhibit, Loss, Row, TaskAccuracy, Unreproducible
from mars_lab.reproduce.mars import final

_BEST = Loss()
_CORPORA = {"owt": "OpenWebText", "fwe": "FineWeb-Edu"}

UNREPRODUCIBLE = (
    Unreproducible(
        "mars-m/rates",
        "MARS-M README, hyperparameters",
        "rates of the runs: `mars recipes show gpt2-small-owt-mars-m`",
    ),
    Unreproducible("mars-m/algorithms", "MARS-M README, Algorithms 1 to 3", "no measurement: docs/optimizer.md"),
)


def exhibits() -> Iterator[Exhibit]:
    """All that can be run."""
    for corpus, size in (("owt", "small"), ("owt", "medium"), ("owt", "large"), ("fwe", "small"), ("fwe", "xl")):
        yield _losses(size, corpus)
    yield Exhibit(
        "mars-m/owt-small-decay",
        "MARS-M README, hyperparameters against configurations",
        "Moonlight and MARS-M at equal decay, which nobody has published; GPT-2 small on OpenWebText",
        tuple(final(f"gpt2-small-owt-{name}") for name in ("moonlight", "mars-m", "mars-m-decay-0.1")),
        note="The table gives MARS-M decay 0.1, which Moonlight has, the authors' configuration 0.01.",
    )
    for dataset in ("cifar10", "cifar100"):
        yield _cifar(dataset)
    for corpus in _CORPORA:
        base = f"gpt2-small-{corpus}-"
        yield Exhibit(
            f"mars-m/{corpus}-small-tasks",
            "MARS-M paper, downstream benchmarks (figures not at hand)",
            f"nine tasks, 0-shot, GPT-2 small on {_CORPORA[corpus]}",
            tuple(Row(base + name) for name in ("adamw", "moonlight", "mars-m")),
            (*(TaskAccuracy(task.name) for task in NINE), TaskAccuracy(MEAN)),
            tasks=("nine",),
        )


def _losses(size: str, corpus: str) -> Exhibit:
    base = f"gpt2-{size}-{corpus}-"
    names = ("adamw", "moonlight", "mars-m", "mars-m-gamma-0.01")
    views = "training and validation loss" if corpus == "fwe" else "validation loss"
    return Exhibit(
        f"mars-m/{corpus}-{size}",
        f"MARS-M README, {_CORPORA[corpus]}: {views}, whole and zoomed in, GPT-2 {size}",
        f"GPT-2 {size} on {_CORPORA[corpus]}, MARS-M with gamma 0.025 and 0.01",
        tuple(final(base + name) for name in names),
        note="Published figures are read off plots; differences of 0.001 mean nothing."
        + (" AdamW's is that of the MARS paper." if corpus == "owt" else ""),
    )


def _cifar(dataset: str) -> Exhibit:
    base = f"{dataset}-resnet18-"
    rows: list[Row] = []
    for name in ("adamw", "muon", "mars-m", "mars-m-exact"):
        figures = published.CIFAR.get(name)
        pair = figures[dataset == "cifar100"] if figures else ()
        rows.append(Row(base + name, dict(zip((_BEST, Accuracy()), pair, strict=False))))
    return Exhibit(
        f"mars-m/{dataset}-resnet18",
        "MARS-M paper, computer vision (figures not at hand)",
        f"ResNet-18 on {dataset.upper().replace('CIFAR', 'CIFAR-')}: test loss and accuracy of MARS-M",
        tuple(rows),
        (_BEST, Accuracy()),
        note="The baselines' figures are the MARS paper's. Rates were not published: tune them (--num-lrs).",
    )
