"""What the tests of training share: text, the command as a process, and bit-for-bit comparison."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mars_lab.cli import main
from mars_lab.report.rows import read_rows
from mars_lab.training.checkpoint import plain
from mars_lab.training.config import RunConfig
from mars_lab.training.metrics import MEASURED
from mars_lab.training.run_folder import RunFolder

VOCABULARY = "the union of states shall have power to lay and collect taxes in all cases of commerce and peace"


def prose(num_words: int, seed: int = 0) -> str:
    """Text from a linear congruential generator: the same for the same seed, everywhere."""
    words = VOCABULARY.split()
    state, out = seed, []
    for _ in range(num_words):
        state = (1103515245 * state + 12345) % 2**31
        out.append(words[state // 65536 % len(words)])
    return " ".join(out) + "\n"


def flags(config: RunConfig) -> list[str]:
    """The command-line flags that turn the default recipe into `config`."""
    task = config.language
    sections = {
        "model": task.model,
        "data": task.data,
        "optimizer": config.optimizer,
        "train": config.train,
    }
    out = [
        "--eval-sequences",
        str(task.eval_sequences),
        "--sample-tokens",
        str(task.sample_tokens),
    ]
    for section, value in sections.items():
        for name, setting in dataclasses.asdict(value).items():
            flag = "corpus" if name == "corpus" else f"{section}.{name.replace('_', '-')}"
            if isinstance(setting, bool):
                out.append(f"--{flag}" if setting else f"--{section}.no-{name.replace('_', '-')}")
            else:
                out += [f"--{flag}", *map(str, setting if isinstance(setting, tuple) else (setting,))]
    return out


def start_mars(*args: str, cwd: Path) -> subprocess.Popen[str]:
    """`mars ARGS` as a process of its own, in the working directory `cwd`."""
    return subprocess.Popen(
        [sys.executable, "-c", "from mars_lab.cli import main; main()", *args],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def assert_refused(args: list[str], message: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`mars ARGS` ends with exit code 2 and `message` in what it says, and leaves nothing in `place`."""
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(place.iterdir())


def outcome(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The last checkpoint of a run and its metrics, both without the times."""
    state = plain.read_newest(RunFolder(path).checkpoints)
    assert state is not None
    del state["seconds"]
    rows = read_rows(path / "metrics.jsonl")
    return state, [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


def assert_identical(actual: Any, expected: Any, where: str = "state") -> None:
    """Equality bit for bit of nested containers of tensors and plain values."""
    assert type(actual) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert torch.equal(actual, expected), where
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for key in expected:
            assert_identical(actual[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), where
        for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
            assert_identical(a, b, f"{where}[{index}]")
    else:
        assert actual == expected, where
