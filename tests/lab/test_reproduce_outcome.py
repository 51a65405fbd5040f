"""Quantities, orderings and tables of made-up runs, by hand."""

from pathlib import Path

import pytest

from mars_lab.report.run_record import read
from mars_lab.reproduce import outcome
from mars_lab.reproduce.exhibit import MEAN, Accuracy, Exhibit, Loss, Row, StepTime, TaskAccuracy
from mars_lab.reproduce.outcome import Cell, Run, cells, measured, verdicts

from .report_runs import config, finished_run, write_run


@pytest.fixture
def made_up(tmp_path: Path) -> Run:
    """Evaluations after each of ten steps of 10 tokens and half a second; the lowest loss is after step 8."""
    losses = [9.0, 8.0, 7.0, 6.0, 5.0, 5.5, 4.0, 3.0, 2.0, 2.5, 2.25]
    path = finished_run(tmp_path / "run", config(), losses)
    answers = {"0": {"hellaswag": {"acc": 0.3, "acc_norm": 0.25, "num_questions": 4}}}
    return Run(read(path, "run"), answers)


def test_quantities_by_hand(made_up: Run) -> None:
    assert measured(Loss(), made_up) == 2.0
    assert measured(Loss(0.5), made_up) == 5.0, "the fifth is higher than the fourth"
    assert measured(Loss(0.01), made_up) == 8.0, "never that of the untrained model"
    assert measured(StepTime(), made_up) == pytest.approx(500.0)
    assert measured(TaskAccuracy("hellaswag"), made_up) == 25.0
    assert measured(TaskAccuracy("hellaswag", 5), made_up) is None
    assert measured(TaskAccuracy(MEAN), made_up) is None
    assert measured(Accuracy(), made_up) is None


def made_up_exhibit() -> Exhibit:
    loss, accuracy = Loss(), Accuracy()
    rows = (
        Row("gpt2-small-owt-adamw", {loss: 3.0, accuracy: 50.0}),
        Row("gpt2-small-owt-muon", {loss: 2.9, accuracy: 50.0}),
        Row("gpt2-small-owt-mars-m", {loss: 2.8, accuracy: 60.0}),
        Row("gpt2-large-owt-adamw", {loss: 1.0}),
    )
    said = ((StepTime(), "gpt2-small-owt-muon", "gpt2-small-owt-adamw"),)
    return Exhibit("mars/made-up", "nowhere", "made up", rows, (loss, accuracy), said)


def test_orderings_by_hand() -> None:
    exhibit = made_up_exhibit()
    values = {
        (Loss(), "small-owt-adamw"): (4.0, 4.2),
        (Loss(), "small-owt-muon"): (4.5, 4.7),
        (Loss(), "small-owt-mars-m"): (3.0, 3.4),
        (Accuracy(), "small-owt-adamw"): (70.0,),
        (Accuracy(), "small-owt-mars-m"): (65.0,),
    }
    found = [Cell(label, quantity, None, numbers, 0) for (quantity, label), numbers in values.items()]
    judged = {
        (v.ordering.better, v.ordering.worse, type(v.ordering.quantity)): (v.held, v.gap)
        for v in verdicts(exhibit, found)
    }
    approx = pytest.approx
    assert judged == {
        ("small-owt-muon", "small-owt-adamw", Loss): (False, approx(-0.5)),
        ("small-owt-mars-m", "small-owt-adamw", Loss): (True, approx(0.9)),
        ("small-owt-mars-m", "small-owt-muon", Loss): (True, approx(1.4)),
        ("small-owt-mars-m", "small-owt-adamw", Accuracy): (False, approx(-5.0)),
        ("small-owt-mars-m", "small-owt-muon", Accuracy): (None, None),
        ("small-owt-muon", "small-owt-adamw", StepTime): (None, None),
    }
    text = outcome.ordering_table(verdicts(exhibit, found)).markdown()
    line = "| small-owt-muon before small-owt-adamw | best validation loss | yes, by 0.1000 | no, by 0.5000 ± 0.2000 |"
    assert line in text
    assert outcome.summary(verdicts(exhibit, found)) == (
        "Of 6 published orderings 2 held here and 2 did not; 2 could not be measured."
    )


def test_what_diverged_is_said_and_in_no_mean(tmp_path: Path) -> None:
    good = Run(read(finished_run(tmp_path / "a", config(), [5.0, 4.0]), "a"), {})
    bad = Run(read(write_run(tmp_path / "b", config(seed=1), [5.0], {"val_loss": None, "diverged": "nan"}), "b"), {})
    exhibit = made_up_exhibit()
    found = cells(exhibit, [Loss()], {"gpt2-small-owt-adamw": [good, bad], "gpt2-small-owt-muon": [bad]})
    assert found[0].values == (4.0,)
    assert [row[3] for row in outcome.table(found).rows] == ["4.0000 (1 diverged)", "1 diverged", "", ""]
