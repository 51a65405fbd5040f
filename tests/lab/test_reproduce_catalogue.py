"""The catalogue of tables and figures against the papers, typed in here once more."""

import re
from typing import Any

import pytest

from mars_lab.cli import main
from mars_lab.recipes.registry import RECIPES, find
from mars_lab.recipes.scales import SCALES
from mars_lab.reproduce.catalogue import EXHIBITS, UNREPRODUCIBLE
from mars_lab.reproduce.exhibit import MEAN, Accuracy, Loss, TaskAccuracy
from mars_lab.tasks.language import LanguageConfig

NAME = "mars/learning-rates"

PAPERS = [
    *(f"MARS paper, Figure {number}" for number in range(1, 8)),
    *(f"MARS paper, Table {number}" for number in range(1, 7)),
    "MARS paper, section B.1",
    "MARS paper, later versions",
    "README, best validation loss",
    "README, FineWeb-Edu: training and validation loss",
    "HellaSwag plot, table of GPT-2 small",
    "HellaSwag plot, table of GPT-2 XL",
    "README, vision tasks: loss and accuracy on CIFAR-10",
    "README, vision tasks: loss and accuracy on CIFAR-100",
    "train_CNN.py",
    *(f"OpenWebText: validation loss, whole and zoomed in, GPT-2 {size}" for size in ("small", "medium", "large")),
    *(f"FineWeb-Edu: training and validation loss, whole and zoomed in, GPT-2 {size}" for size in ("small", "xl")),
    "MARS-M README, hyperparameters",
    "MARS-M paper, computer vision",
    "MARS-M paper, downstream benchmarks",
]
"""What the papers and READMEs show, by the numbers of the versions at hand."""


def test_every_table_and_figure_is_in_the_catalogue() -> None:
    listed = [entry.where for entry in (*EXHIBITS.values(), *UNREPRODUCIBLE.values())]
    for shown in PAPERS:
        found = [where for where in listed if re.search(rf"{re.escape(shown)}(?!\d)", where)]
        assert found, f"{shown} is missing"
    measured_tables = {shown for shown in PAPERS if re.search(r"Figure|Table 1$", shown)}
    for shown in measured_tables:
        assert any(shown in exhibit.where for exhibit in EXHIBITS.values()), f"{shown} has measurements"
    assert not set(EXHIBITS) & set(UNREPRODUCIBLE)


def test_recipes_of_the_catalogue_exist_at_every_scale() -> None:
    for name, exhibit in EXHIBITS.items():
        labels = [exhibit.label(row) for row in exhibit.rows]
        assert len(set(labels)) == len(labels), name
        for scale in ("", *(f"{scale}/" for scale in SCALES)):
            configs = [find(scale + row.recipe).config for row in exhibit.runs]
            data = {c.task.data.tokens if isinstance(c.task, LanguageConfig) else c.task.data.path for c in configs}
            assert len(data) == 1, f"{name} has one --corpus"
        list(exhibit.orderings())


def test_published_figures_of_the_recipes_are_in_a_table() -> None:
    rows = {row.recipe for exhibit in EXHIBITS.values() for row in exhibit.runs if row.published}
    assert {name for name, recipe in RECIPES.items() if recipe.published or recipe.published_accuracy} <= rows


@pytest.mark.parametrize(
    ("name", "label", "quantity", "figure"),
    [
        ("mars/owt-small", "muon", Loss(0.1, "5B"), 3.165),
        ("mars/owt-large", "mars-adamw", Loss(1.0, "50B"), 2.518),
        ("mars/gamma", "gamma 0.025", Loss(), 2.871),
        ("mars/gamma", "gamma 0 to 0.2", Loss(), 2.899),
        ("mars/learning-rates", "mars-adamw-lr-x0.5", Loss(), 2.852),
        ("mars/owt-hellaswag", "large, MARS-AdamW", TaskAccuracy("hellaswag"), 44.20),
        ("mars/fwe-small-tasks", "mars-adamw", TaskAccuracy("sciq"), 71.10),
        ("mars/cifar100-resnet18", "mars-lion-exact", Accuracy(), 76.15),
        ("mars-m/fwe-xl", "mars-m-gamma-0.01", Loss(), 2.378),
    ],
)
def test_figures_are_those_of_the_papers(name: str, label: str, quantity: Any, figure: float) -> None:
    (row,) = [row for row in EXHIBITS[name].rows if EXHIBITS[name].label(row) == label]
    assert row.published[quantity] == figure


def test_the_published_means_of_nine_tasks() -> None:
    exhibit = EXHIBITS["mars/fwe-small-tasks"]
    means = {exhibit.label(row): round(row.published[TaskAccuracy(MEAN)], 2) for row in exhibit.rows}
    assert means == {"adamw": 45.72, "mars-adamw": 45.93, "GPT-2 small, OpenAI": 41.19}


def test_the_two_rates_are_those_of_figure_6() -> None:
    rates = {row.recipe: find(row.recipe).config.optimizer.lr for row in EXHIBITS[NAME].runs}
    assert list(rates.values()) == pytest.approx([6e-4, 3e-3, 3e-3])
    decayed = find("gpt2-small-owt-mars-m-decay-0.1").config.optimizer
    assert (decayed.weight_decay, decayed.weight_decay_1d) == (0.1, 0.01)


def test_the_list_names_all(capsys: pytest.CaptureFixture[str]) -> None:
    main(["reproduce"])
    out = capsys.readouterr().out
    for name, exhibit in EXHIBITS.items():
        assert f"{name:24} {len(exhibit.runs)} runs, each" in out
        assert exhibit.where in out
    for name, entry in UNREPRODUCIBLE.items():
        assert name in out
        assert entry.reason in out
