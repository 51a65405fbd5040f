"""Runs the faults and compares what comes out with a training that nothing has disturbed."""

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mars_lab.data.tokens import DataConfig
from mars_lab.drill.faults import FAULTS, TIMEOUT, Fault
from mars_lab.models.gpt2 import GPT2Config
from mars_lab.report.rows import read_rows
from mars_lab.tasks.language import LanguageConfig
from mars_lab.training import run_folder
from mars_lab.training.checkpoint import plain
from mars_lab.training.config import OptimizerConfig, RunConfig, TrainConfig
from mars_lab.training.metrics import MEASURED
from mars_lab.training.run_folder import RunFolder

_PATIENCE = 180
"""Seconds for one training of a few steps; beyond them the drill itself has failed."""


@dataclass(frozen=True)
class Row:
    """What became of one fault."""

    injected: str
    detected: bool
    recovered: str
    """How the training went on: `restarted` by itself, or `resumed` by a command; `no` if it did not end well."""
    bytes_lost: int
    """Bytes of the last checkpoint's tensors and of the metrics that are missing or differ at the end."""
    weights_equal: bool
    output: str
    """Everything that was printed."""

    @property
    def is_good(self) -> bool:
        """Whether it is as if nothing had happened."""
        return self.detected and self.recovered != "no" and self.bytes_lost == 0 and self.weights_equal


class Drill:
    """Trainings of a tiny model by two processes in `folder`; one undisturbed, and one for each fault."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        text = folder / "text.txt"
        text.write_text("".join(f"Line {i}, which is {i * i % 97} and {i * 7 % 31}.\n" for i in range(400)))
        model = GPT2Config(num_layers=2, num_heads=2, width=16, context_length=16, vocab_size=300, dropout=0.1)
        data = DataConfig(str(text), tokenizer_size=300, val_fraction=0.1, cache=str(folder / "data"))
        train = TrainConfig(num_steps=10, batch_size=4, precision="fp32", device="cpu", timeout=TIMEOUT)
        self._config = RunConfig(
            LanguageConfig(model, data, eval_sequences=8, sample_tokens=2),
            OptimizerConfig(name="mars-adamw", lr=0.01),
            replace(train, timeout=TIMEOUT, eval_every=5, checkpoint_every=3, num_checkpoints=3),
        )
        self._undisturbed = self._new_run("undisturbed")
        self._resume(self._undisturbed)

    def run(self, name: str) -> Row:
        """Inject the fault `name`, let the training recover, and compare."""
        fault, folder = FAULTS[name], self._new_run(name)
        output, code = _run("-m", "mars_lab.drill.launcher", str(folder.path), name)
        assert (folder.path / ".fault").exists(), f"{name} did not strike:\n{output}"
        how = "restarted" if code == 0 and folder.summary() is not None else "resumed"
        if how == "resumed":
            fault.repair(self._config)
            output += self._resume(folder)
        return self._row(fault, folder, how, output)

    def _row(self, fault: Fault, folder: RunFolder, how: str, output: str) -> Row:
        expected_how = "restarted" if fault.restarts_itself else "resumed"
        finished = folder.summary() is not None and how == expected_how
        state, wanted = (plain.read_newest(run.checkpoints) or {} for run in (folder, self._undisturbed))
        same = state.get("model", {}).keys() == wanted["model"].keys() and all(
            torch.equal(state["model"][key], value) for key, value in wanted["model"].items()
        )
        lost = _bytes_lost(state, wanted) + _rows_lost(folder, self._undisturbed)
        detected = re.search(fault.says, output) is not None
        return Row(fault.what, detected, how if finished else "no", lost, same, output)

    def _new_run(self, name: str) -> RunFolder:
        return run_folder.create(self._folder, name, self._config, numbered=False)

    @staticmethod
    def _resume(folder: RunFolder) -> str:
        output, code = _run("-m", "mars_lab.train", "--resume", str(folder.path), "--nproc", "2")
        return f"{output}\n(exit code {code})\n"


def table(rows: Sequence[Row]) -> str:
    """A row for each fault."""
    lines = ["| injected | detected | recovered | bytes lost | final weights equal |", "|---|---|---|---|---|"]
    for row in rows:
        answers = ("no", "yes")
        lines.append(
            f"| {row.injected} | {answers[row.detected]} | {row.recovered} | {row.bytes_lost} | "
            f"{answers[row.weights_equal]} |"
        )
    return "\n".join(lines)


def _run(*arguments: str) -> tuple[str, int]:
    process = subprocess.run(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=_PATIENCE
    )
    return process.stdout, process.returncode


def _bytes_lost(state: Mapping[Any, Any], wanted: Mapping[Any, Any]) -> int:
    """Bytes of tensors in `wanted` that `state` lacks or has otherwise."""
    lost = 0
    for key, value in wanted.items():
        found = state.get(key)
        if isinstance(value, torch.Tensor):
            is_same = isinstance(found, torch.Tensor) and torch.equal(found, value)
            lost += 0 if is_same else value.nbytes
        elif isinstance(value, list | tuple):
            pairs = found if isinstance(found, list | tuple) else ()
            lost += _bytes_lost(dict(enumerate(pairs)), dict(enumerate(value)))
        elif isinstance(value, dict):
            lost += _bytes_lost(found if isinstance(found, dict) else {}, value)
    return lost


def _rows_lost(folder: RunFolder, undisturbed: RunFolder) -> int:
    """Bytes of metrics, what the machine decides not counted, that are missing or differ."""
    rows, wanted = (
        [
            json.dumps({name: value for name, value in row.items() if name not in MEASURED})
            for row in read_rows(run.metrics)
        ]
        for run in (folder, undisturbed)
    )
    return sum(len(row) for row in wanted if row not in rows)
