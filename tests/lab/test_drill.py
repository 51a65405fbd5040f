"""Every fault of the drill, injected into real processes that real launchers look after."""

from pathlib import Path

import pytest

from mars_lab.cli import main
from mars_lab.drill.faults import FAULTS
from mars_lab.drill.table import Drill, Row, table


@pytest.fixture(scope="module")
def drill(tmp_path_factory: pytest.TempPathFactory) -> Drill:
    return Drill(tmp_path_factory.mktemp("drill"))


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_ends_as_if_it_had_not_been(name: str, drill: Drill) -> None:
    row = drill.run(name)
    assert row.detected, row.output
    assert row.recovered == ("restarted" if FAULTS[name].restarts_itself else "resumed"), row.output
    assert row.bytes_lost == 0, row.output
    assert row.weights_equal, row.output


def test_the_table_has_a_row_for_each_fault() -> None:
    rows = [Row("a storm", True, "restarted", 0, True, ""), Row("a flood", False, "no", 17, False, "")]
    assert table(rows).splitlines()[2:] == [
        "| a storm | yes | restarted | 0 | yes |",
        "| a flood | no | no | 17 | no |",
    ]
    assert [row.is_good for row in rows] == [True, False]


def test_unknown_faults_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["drill", "--faults", "earthquake"])
    assert "no fault 'earthquake'; known: kill-worker" in capsys.readouterr().err
