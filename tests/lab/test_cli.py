from pathlib import Path

import pytest

from mars_lab.cli import _COMMANDS, main
from mars_lab.training.config import RunConfig
from mars_lab.training.run_folder import RunFolder

from .tiny_runs import flags


def fails(*args: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def test_train_then_sample_then_resume(tmp_path: Path, tiny: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    runs = ("--runs", str(tmp_path))
    main(["train", *flags(tiny), *runs])
    folder = RunFolder(tmp_path / "mars-m-001")
    assert folder.config() == tiny
    out = capsys.readouterr().out
    assert "step 12: validation loss" in out
    assert "Validation loss" in out.splitlines()[-2]
    assert f"mars sample {folder.path}" in out

    outputs = []
    for seed in ("0", "0", "1"):
        main(["sample", "mars-m-001", "--prompt", "the union of", "--num-tokens", "20", "--seed", seed, *runs])
        outputs.append(capsys.readouterr().out)
    assert outputs[0].startswith("the union of")
    assert len(outputs[0]) > 30
    assert outputs[0] == outputs[1] != outputs[2]
    main(["sample", *runs])
    assert capsys.readouterr().out

    main(["train", "--resume", *runs])
    assert "mars-m-001 is finished; there is nothing to resume" in capsys.readouterr().out


def test_resume_alone_takes_the_run_started_last(
    tmp_path: Path, tiny: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("b", "a"):
        main(["train", "adamw", *flags(tiny), "--name", name, "--runs", str(tmp_path)])
        (tmp_path / name / "summary.json").unlink()
    capsys.readouterr()
    main(["train", "--resume", "--runs", str(tmp_path)])
    assert f"Continuing {tmp_path / 'a'}" in capsys.readouterr().out
    assert (tmp_path / "a" / "summary.json").exists()
    assert not (tmp_path / "b" / "summary.json").exists()
    main(["train", "--resume", "b", "--runs", str(tmp_path)])
    assert (tmp_path / "b" / "summary.json").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["trian"], "no command 'trian'; did you mean 'train'?"),
        (["train", "mars-n"], "no recipe 'mars-n'; nearest: mars-m"),
        (["train", "--resume", "--runs", "nowhere"], "no run in nowhere/; start one with `mars train`"),
        (["train", "--resume", "gone", "--runs", "nowhere"], "no run 'gone': neither that folder nor nowhere/gone"),
        (["train", "--model.num-heads", "5"], "model.width (192) must be a multiple of model.num_heads (5)"),
        (["train", "--corpus", "missing.txt"], "no corpus at 'missing.txt'"),
        (["sample", "gone", "--runs", "nowhere"], "no run 'gone'"),
        (["compare", "--optimizers", "adam"], "no optimizer 'adam' to compare; known: mars-m, adamw"),
        (["compare", "--num-lrs", "0"], "compare needs at least one of"),
    ],
)
def test_mistakes_end_in_one_line_and_code_2(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fails(*args) == 2
    error = capsys.readouterr().err
    assert message in " ".join(error.split())
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir()), "a mistake must not leave anything behind"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--lr", "1"], "--optimizer.lr"),
        (["--train.num-step", "10"], "--train.num-steps"),
        (["--optimizer.lr", "fast"], "--optimizer.lr"),
        (["--optimizer.name", "mars-x"], "mars-adamw"),
        (["--resume", "--optimizer.lr", "1"], "--optimizer.lr"),
    ],
)
def test_bad_flags_are_answered_with_good_ones(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fails("train", *args) == 2
    assert message in capsys.readouterr().err


def test_a_diverging_run_ends_with_code_1(tmp_path: Path, tiny: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    args = [*flags(tiny), "--optimizer.name", "adamw", "--optimizer.lr", "1e30", "--runs", str(tmp_path)]
    assert fails("train", *args) == 1
    assert "lower --optimizer.lr" in capsys.readouterr().err


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"]):
        main(arguments)
        out = capsys.readouterr().out
        assert all(f"\n  {command} " in out for command in _COMMANDS)
