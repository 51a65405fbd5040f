import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mars_lab.errors import InputError
from mars_lab.training import checkpoint


def save_three(folder: Path, num_kept: int = 3) -> None:
    for step in (10, 20, 30):
        checkpoint.save(folder, step, {"step": step, "weights": torch.full((3,), float(step))}, num_kept=num_kept)


def loaded_step(folder: Path) -> int:
    state = checkpoint.load_newest(folder, "cpu")
    assert state is not None
    return state["step"]


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert checkpoint.load_newest(tmp_path / "checkpoints", "cpu") is None


def test_the_newest_are_kept(tmp_path: Path) -> None:
    save_three(tmp_path / "c", num_kept=2)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["step-00000020", "step-00000030"]
    assert loaded_step(tmp_path / "c") == 30


def flip_a_bit(path: Path) -> None:
    data = bytearray((path / "state.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "state.pt").write_bytes(data)


def truncate(path: Path) -> None:
    data = (path / "state.pt").read_bytes()
    (path / "state.pt").write_bytes(data[: len(data) // 2])


DAMAGES: list[Callable[[Path], object]] = [
    flip_a_bit,
    truncate,
    lambda path: (path / "state.pt").unlink(),
    lambda path: (path / "manifest.json").unlink(),
    lambda path: (path / "manifest.json").write_text("{"),
    lambda path: (path / "manifest.json").write_text("{}"),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_named_and_the_one_before_is_used(
    tmp_path: Path, damage: Callable[[Path], object], capsys: pytest.CaptureFixture[str]
) -> None:
    save_three(tmp_path)
    damage(tmp_path / "step-00000030")
    assert loaded_step(tmp_path) == 20
    assert "step-00000030 is damaged" in capsys.readouterr().err
    # The resumed run writes over the damaged one, and it must not outlive a checkpoint that is good.
    checkpoint.save(tmp_path, 25, {"step": 25}, num_kept=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000025"]
    assert loaded_step(tmp_path) == 25


def test_nothing_but_damaged_ones_is_an_error(tmp_path: Path) -> None:
    save_three(tmp_path)
    for path in tmp_path.iterdir():
        truncate(path)
    with pytest.raises(InputError, match=r"every checkpoint in .* is damaged"):
        checkpoint.load_newest(tmp_path, "cpu")


def test_a_crash_while_writing_leaves_the_previous_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_three(tmp_path)

    def fail(self: Path, target: Path) -> Path:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(OSError, match="no space left"):
            checkpoint.save(tmp_path, 40, {"step": 40}, num_kept=3)
    assert loaded_step(tmp_path) == 30
    checkpoint.save(tmp_path, 40, {"step": 40}, num_kept=3)
    assert loaded_step(tmp_path) == 40
    assert not list(tmp_path.glob(".*")), "what the crash left must be cleaned up"


def test_a_folder_that_was_half_deleted_is_not_used(tmp_path: Path) -> None:
    save_three(tmp_path)
    shutil.rmtree(tmp_path / "step-00000030")
    (tmp_path / "step-00000030").mkdir()
    assert loaded_step(tmp_path) == 20


def test_random_generators_continue(tmp_path: Path) -> None:
    def draw() -> tuple[float, ...]:
        return (random.random(), float(np.random.normal()), torch.rand(1).item(), torch.randn(1).item())

    draw()
    checkpoint.save(tmp_path, 1, {"random": checkpoint.random_state()}, num_kept=1)
    expected = [draw() for _ in range(3)]
    state = checkpoint.load_newest(tmp_path, "cpu")
    assert state is not None
    checkpoint.restore_random_state(state["random"])
    assert [draw() for _ in range(3)] == expected
