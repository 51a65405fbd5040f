"""The training loop. It knows a `Task`, a configuration and a folder, and nothing of language."""

import dataclasses
import json
import math
import random
import time
from typing import Any

import numpy as np
import torch
from torch import nn

from mars_lab.errors import InputError, TrainingError
from mars_lab.report import loss_curve
from mars_lab.tasks.task import Task, changed_lines
from mars_lab.training import checkpoint, optimizers
from mars_lab.training.config import RunConfig
from mars_lab.training.diagnostics import Diagnostics
from mars_lab.training.interruption import Interrupted, Interruption
from mars_lab.training.metrics import Metrics
from mars_lab.training.prefetch import Prefetch
from mars_lab.training.progress import RunProgress
from mars_lab.training.run_folder import RunFolder

_DIAGNOSTICS_EVERY = 10
"""Steps between rows with diagnostics; each costs about as much as an optimizer step of AdamW."""


def train(task: Task, config: RunConfig, folder: RunFolder, *, quiet: bool = False) -> dict[str, Any]:
    """Train to the end, from the newest checkpoint in `folder` if there is one, and return the summary.

    A run that was stopped at any moment and continued by this function has the same weights, optimizer state and
    losses, bit for bit, as one that never stopped (on the same machine, with the same number of threads).

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the state has been saved.
        TrainingError: the loss or a weight is not finite.
        InputError: the data changed since the run began, or no checkpoint is readable.
    """
    with folder.locked():
        run = Run(task, config, folder)
        folder.write("groups.txt", run.stepper.audit + "\n")
        last = config.train.num_steps
        with (
            Metrics(folder, run.step) as metrics,
            RunProgress(last, run.step, quiet=quiet) as progress,
            Interruption() as interruption,
        ):
            if run.step == 0:
                run.evaluate(metrics, progress)
            while run.step < last:
                run.take_step(metrics, progress)
                if run.step % config.train.eval_every == 0 or run.step == last:
                    run.evaluate(metrics, progress)
                stop = interruption.signal_number
                if run.step % config.train.checkpoint_every == 0 or run.step == last or stop:
                    run.save(metrics)
                if stop and run.step < last:
                    raise Interrupted(run.step, stop)
        return run.finish()


class Run:
    """Everything that changes while training: model, optimizer, step, clock."""

    def __init__(self, task: Task, config: RunConfig, folder: RunFolder) -> None:
        self.task, self.config, self.folder = task, config.train, folder
        random.seed(config.train.seed)
        np.random.seed(config.train.seed)
        torch.manual_seed(config.train.seed)
        dtype = torch.bfloat16 if config.train.precision == "bf16-params" else None
        self.model: nn.Module = task.build_model().to(config.train.device, dtype)
        self.batches = Prefetch(task.batch, config.train.device)
        self.stepper = optimizers.build(self.model, config.optimizer, config.train)
        sequences = config.train.batch_size * config.train.num_accumulation_steps
        self.diagnostics = Diagnostics(self.stepper.parts, self.model.named_parameters(), sequences)
        self.step = 0
        self.seconds = 0.0
        """Time spent in steps, evaluations and checkpoints not counted."""
        self.val_loss = math.nan
        self._config_dict = dataclasses.asdict(config)
        if (state := checkpoint.load_newest(folder.checkpoints, config.train.device)) is not None:
            self._load(state)
        if config.train.compile:
            self.model.compile()

    @property
    def tokens(self) -> int:
        """Training targets seen so far."""
        sequences = self.config.batch_size * self.config.num_accumulation_steps
        return self.step * sequences * self.task.tokens_per_sequence

    def take_step(self, metrics: Metrics, progress: RunProgress) -> None:
        begin, lr, tokens_before = time.perf_counter(), self.stepper.lr, self.tokens
        if is_measured := (self.step + 1) % _DIAGNOSTICS_EVERY == 0:
            self.diagnostics.arm()
        loss, norm = self.stepper.step(self._backward, measure_norm=is_measured)
        seconds = time.perf_counter() - begin
        self.step += 1
        self.seconds += seconds
        row = {"tokens": self.tokens, "seconds": self.seconds, "loss": loss, "lr": lr}
        if norm is not None:
            row |= {"grad_norm": norm, **self.diagnostics.collect(tokens=self.tokens, seconds=self.seconds)}
        metrics.log(self.step, row)
        progress.step(self.step, loss, self.tokens - tokens_before)

    def _backward(self) -> float:
        """Mean loss of this step's sequences; leaves its gradient in `.grad`."""
        count, size = self.config.num_accumulation_steps, self.config.batch_size
        total = 0.0
        for index in range(count):
            first = (self.step * count + index) * size
            batch = self.batches.take(first, size, following=first + size)
            with self._autocast():
                loss = self.task.loss(self.model, batch) / count
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            raise self._not_finite(f"the loss is {total} at step {self.step + 1}")
        return total

    def evaluate(self, metrics: Metrics, progress: RunProgress) -> None:
        with self._autocast():
            measures = self.task.evaluate(self.model, self.config.device)
        self.val_loss = measures["val_loss"]
        metrics.log(self.step, {"tokens": self.tokens, "seconds": self.seconds, **measures})
        progress.evaluated(self.step, self.val_loss)

    def save(self, metrics: Metrics) -> None:
        """Write a checkpoint, unless a weight is not finite: such a checkpoint would replace a good one."""
        for name, parameter in self.model.named_parameters():
            if not parameter.isfinite().all():
                raise self._not_finite(f"the weight {name} is not finite after step {self.step}")
        metrics.flush_to_disk()
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "val_loss": self.val_loss,
            "model": self.model.state_dict(),
            "stepper": self.stepper.state_dict(),
            "random": checkpoint.random_state(),
            "data": self.task.fingerprint,
            "config": self._config_dict,
        }
        checkpoint.save(self.folder.checkpoints, self.step, state, num_kept=self.config.num_checkpoints)

    def finish(self) -> dict[str, Any]:
        """Write the figure, the sample and, last, the summary, which marks the run as finished."""
        loss_curve.draw(self.folder.metrics, self.folder.path / "loss", self.folder.path.name)
        with self._autocast():
            sample = self.task.sample(self.model, self.config.device)
        self.folder.write("sample.txt", sample + "\n")
        summary = {
            "val_loss": self.val_loss,
            "steps": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "gradient_evaluations_per_step": self.stepper.gradient_evaluations,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "torch": torch.__version__,
        }
        self.folder.write("summary.json", json.dumps(summary, indent=2) + "\n")
        return summary

    def _autocast(self) -> torch.autocast:
        device_type = torch.device(self.config.device).type
        return torch.autocast(device_type, torch.bfloat16, enabled=self.config.precision.startswith("bf16"))

    def _load(self, state: dict[str, Any]) -> None:
        if state["data"] != self.task.fingerprint:
            raise InputError(
                f"the data of {self.folder.path} changed since the run began; restore it, or start a new run "
                f"({changed_lines(state['data'], self.task.fingerprint)})"
            )
        self.model.load_state_dict(state["model"])
        self.stepper.load_state_dict(state["stepper"])
        self.step, self.seconds, self.val_loss = state["step"], state["seconds"], state["val_loss"]
        checkpoint.restore_random_state(state["random"])

    def _not_finite(self, what: str) -> TrainingError:
        good = checkpoint.newest(self.folder.checkpoints)
        return TrainingError(
            f"{what}; the last good checkpoint is "
            f"{good or 'none, it failed before the first was due'}. "
            "Try a lower --optimizer.lr or a larger --train.warmup-fraction"
        )
