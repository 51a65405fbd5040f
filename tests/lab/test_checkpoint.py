"""Checkpoints of one process: whole or not at all, damage noticed; tests/lab/test_resharding.py has several."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mars_lab.errors import InputError, TrainingError
from mars_lab.ranks import Ranks
from mars_lab.training.checkpoint import loader, random_state
from mars_lab.training.checkpoint import saver as saver_module
from mars_lab.training.checkpoint.contents import Contents
from mars_lab.training.checkpoint.saver import Saver


def save(folder: Path, *steps: int, num_kept: int = 3) -> None:
    with Saver(folder, Ranks(), num_kept=num_kept) as saver:
        for step in steps:
            saver.save(step, Contents({"weights": torch.full((3,), float(step))}, {"step": step}))


def loaded_step(folder: Path) -> int:
    path = loader.newest_good(folder, Ranks())
    assert path is not None
    weights = {"weights": torch.zeros(3)}
    loader.read_into(path, weights, Ranks())
    step: int = loader.read_values(path)["step"]
    assert weights["weights"].tolist() == [step] * 3
    return step


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert loader.newest_good(tmp_path / "checkpoints", Ranks()) is None


def test_the_newest_are_kept(tmp_path: Path) -> None:
    save(tmp_path / "c", 10, 20, 30, num_kept=2)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["step-00000020", "step-00000030"]
    assert loaded_step(tmp_path / "c") == 30


def test_what_is_saved_is_what_was_there_when_save_was_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing begins after the tensor has changed, and the checkpoint still has the old value."""
    weights = torch.full((3,), 10.0)
    write = saver_module.dcp.save

    def change_then_write(*arguments: Any) -> None:
        weights.fill_(-1)
        write(*arguments)

    monkeypatch.setattr(saver_module.dcp, "save", change_then_write)
    with Saver(tmp_path, Ranks(), num_kept=1) as saver:
        saver.save(10, Contents({"weights": weights}, {"step": 10}))
    assert loaded_step(tmp_path) == 10


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


DAMAGES: list[Callable[[Path], object]] = [
    *(
        lambda path, name=name, harm=harm: harm(path / name)
        for name in ("__0_0.distcp", "values.pt", ".metadata")
        for harm in (flip_a_bit, truncate, Path.unlink)
    ),
    lambda path: (path / "manifest.json").unlink(),
    lambda path: (path / "manifest.json").write_text("{"),
    lambda path: (path / "manifest.json").write_text("{}"),
    lambda path: (path / "manifest.json").write_text("[]"),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_named_and_the_one_before_is_used(
    tmp_path: Path, damage: Callable[[Path], object], capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 10, 20, 30)
    damage(tmp_path / "step-00000030")
    assert loaded_step(tmp_path) == 20
    assert "step-00000030 is damaged" in capsys.readouterr().err
    # The resumed run writes over the damaged one, and it must not outlive a checkpoint that is good.
    save(tmp_path, 25, num_kept=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000025"]
    assert loaded_step(tmp_path) == 25


def test_nothing_but_damaged_ones_is_an_error(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)
    for path in tmp_path.iterdir():
        truncate(path / "__0_0.distcp")
    with pytest.raises(InputError, match=r"every checkpoint in .* is damaged"):
        loader.newest_good(tmp_path, Ranks())


def test_a_crash_while_writing_leaves_the_previous_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 10, 20, 30)

    def fail(self: Path, target: Path) -> Path:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(TrainingError, match=r"not be written to .*: no space left on device .*; the one before"):
            save(tmp_path, 40)
    assert loaded_step(tmp_path) == 30
    save(tmp_path, 40)
    assert loaded_step(tmp_path) == 40
    assert not list(tmp_path.glob(".*")), "what the crash left must be cleaned up"


def test_a_failed_save_is_reported_by_the_next(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("a file where the folder should be")
    saver = Saver(tmp_path / "c", Ranks(), num_kept=1)
    saver.save(1, Contents({}, {}))
    with pytest.raises(TrainingError, match="could not be written to"):
        saver.save(2, Contents({}, {}))


def test_a_folder_that_was_half_deleted_is_not_used(tmp_path: Path) -> None:
    save(tmp_path, 20, 30)
    shutil.rmtree(tmp_path / "step-00000030")
    (tmp_path / "step-00000030").mkdir()
    assert loaded_step(tmp_path) == 20


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"other": torch.zeros(3)}, r"other of shape \(3,\) is not in it"),
        ({"weights": torch.zeros(4)}, r"weights of shape \(4,\) has shape \(3,\) in it"),
    ],
)
def test_another_model_is_refused(tmp_path: Path, wanted: dict[str, torch.Tensor], message: str) -> None:
    save(tmp_path, 10)
    with pytest.raises(InputError, match=f"was saved from another model: {message}"):
        loader.read_into(tmp_path / "step-00000010", wanted, Ranks())


def test_random_generators_continue() -> None:
    def draw() -> tuple[float, ...]:
        return (random.random(), float(np.random.normal()), torch.rand(1).item(), torch.randn(1).item())

    draw()
    data = random_state.packed(random_state.random_state())
    expected = [draw() for _ in range(3)]
    random_state.restore_random_state(random_state.unpacked(data))
    assert [draw() for _ in range(3)] == expected
