"""Everything that changes while training: model, optimizer, step, clock."""

import dataclasses
import math
import random
import signal
import sys
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mars_lab.errors import DivergenceError, InputError
from mars_lab.tasks.task import Task, changed_lines
from mars_lab.training import optimizers
from mars_lab.training.checkpoint import contents, dcp, loader
from mars_lab.training.checkpoint import folder as folders
from mars_lab.training.checkpoint.contents import MODEL, RANDOM, Contents
from mars_lab.training.checkpoint.random_state import packed, random_state, restore_random_state, unpacked
from mars_lab.training.checkpoint.saver import Saver
from mars_lab.training.config import RunConfig
from mars_lab.training.diagnostics import Diagnostics
from mars_lab.training.interruption import Interruption
from mars_lab.training.metrics import Metrics
from mars_lab.training.parallel import Forward, spread
from mars_lab.training.prefetch import Prefetch
from mars_lab.training.processes import Processes
from mars_lab.training.progress import RunProgress
from mars_lab.training.run_folder import RunFolder
from mars_lab.training.watchdog import Watchdog

_DIAGNOSTICS_EVERY = 10
"""Steps between rows with diagnostics; each costs about as much as an optimizer step of AdamW."""


class Run:
    """A run as it stands after `step` steps, on one of its processes."""

    def __init__(
        self,
        task: Task,
        config: RunConfig,
        folder: RunFolder,
        *,
        processes: Processes,
        saver: Saver,
        watchdog: Watchdog,
        interruption: Interruption,
    ) -> None:
        self.task, self.config, self.folder, self.ranks = task, config.train, folder, processes.ranks
        self.watchdog, self._saver, self._interruption = watchdog, saver, interruption
        self._seed(0)  # every process draws the same weights
        dtype = torch.bfloat16 if config.train.precision == "bf16-params" else None
        self.model: nn.Module = task.build_model().to(self.ranks.device, dtype)
        spread(self.model, task, config.train, processes)
        self.stepper = optimizers.build(self.model, config.optimizer, config.train, processes.replicas)
        sequences = config.train.batch_size * config.train.num_accumulation_steps
        self._diagnostics = Diagnostics(
            self.stepper.parts,
            self.model.named_parameters(),
            sequences,
            state_is_shared_out=config.optimizer.shard_state and processes.replicas is not None,
        )
        self._batches = Prefetch(task.batch, self.ranks.device)
        self.step = 0
        self.stop = 0
        """The signal with which any process was asked to stop; 0 for none."""
        self.seconds = 0.0
        """Time spent in steps, evaluations and checkpoints not counted."""
        self.measures: dict[str, float] = {"val_loss": math.nan}
        """Of the last evaluation."""
        self._names: dict[Tensor, str] = {p: name for name, p in self.model.named_parameters()}
        self._config_dict = dataclasses.asdict(config)
        if self.ranks.share > 0:
            self._seed(self.ranks.share)  # dropout differs between parts of a batch
        if (path := loader.newest_good(folder.checkpoints, self.ranks)) is not None:
            self._load(path)
        self._forward = Forward(self.model, task, config.train, processes)

    def _seed(self, share: int) -> None:
        seed = self.config.seed
        random.seed(seed + (share << 32))
        np.random.seed(seed if share == 0 else np.random.SeedSequence([seed, share]).generate_state(4))
        torch.manual_seed(seed + (share << 32))

    @property
    def tokens(self) -> int:
        """Training targets seen so far, by all processes."""
        sequences = self.config.batch_size * self.config.num_accumulation_steps
        return self.step * sequences * self.task.tokens_per_sequence

    def take_step(self, metrics: Metrics, progress: RunProgress) -> None:
        begin, lr, tokens_before = time.perf_counter(), self.stepper.lr, self.tokens
        if is_measured := (self.step + 1) % _DIAGNOSTICS_EVERY == 0:
            self._diagnostics.arm()
        loss, norm = self.stepper.step(self._backward, measure_norm=is_measured)
        seconds = time.perf_counter() - begin
        self.step += 1
        self.seconds += seconds
        row = {"tokens": self.tokens, "seconds": self.seconds, "loss": loss, "lr": lr, **self.stepper.scaling.measures}
        if norm is not None:
            row |= {"grad_norm": norm, **self._diagnostics.collect(tokens=self.tokens, seconds=self.seconds)}
        metrics.log(self.step, {name: value for name, value in row.items() if math.isfinite(value)})
        progress.step(self.step, loss, self.tokens - tokens_before)
        if self.stepper.scaling.is_exhausted:
            raise self._not_finite(
                f"float16 overflows whatever the scale of the loss, which has fallen below 1 at step {self.step}",
                remedies="--train.precision bf16 or fp32, ",
            )

    def _backward(self) -> float:
        """Mean loss of this step's sequences, of all processes; leaves its gradient, scaled, in `.grad`."""
        count, size = self.config.num_accumulation_steps, self.config.batch_size
        rows = self.ranks.rows(size)
        losses: list[Tensor] = []
        for index in range(count):
            self.watchdog.enter(f"reading the batch of step {self.step + 1}")
            first = (self.step * count + index) * size + rows.start
            batch = self._batches.take(first, rows.stop - rows.start, following=first + size)
            self.watchdog.enter(f"forward and backward of step {self.step + 1}, which exchange weights or gradients")
            with self._forward.accumulating(is_last=index == count - 1):
                with self.autocast():
                    loss = self.task.loss(self._forward.module, batch) / count
                self.stepper.scaling.scale(loss).backward()
            losses.append(loss.detach())
        total = self._agree(sum(torch.stack(losses).tolist()))
        self.watchdog.enter(f"the optimizer's part of step {self.step + 1}")
        if not math.isfinite(total) and not self.stepper.scaling.is_enabled:  # it skips the step
            raise self._not_finite(f"the loss is {total} at step {self.step + 1}")
        return total

    def _agree(self, loss: float) -> float:
        """The mean of `loss` over all processes, which also learn of each other's signals and failed saves."""
        self.watchdog.enter(f"all-reduce of the loss of step {self.step + 1}")
        noted = self._interruption.signal_number
        flags = (noted == signal.SIGINT, noted == signal.SIGTERM, self._saver.has_failed)
        total, num_int, num_term, num_failures = self.ranks.sums([loss, *map(float, flags)])
        if num_int or num_term:
            self.stop = signal.SIGINT if num_int else signal.SIGTERM
        if num_failures:
            self._saver.wait()  # raises: a save that fails on one process fails on all
        return total / self.ranks.size

    def evaluate(self, metrics: Metrics, progress: RunProgress) -> None:
        self.watchdog.enter(f"the evaluation after step {self.step}")
        with self.autocast():
            self.measures = self.task.evaluate(self.model, self.ranks)
        metrics.log(self.step, {"tokens": self.tokens, "seconds": self.seconds, **self.measures})
        progress.evaluated(self.step, self.measures)

    def save(self, metrics: Metrics) -> None:
        """Begin to write a checkpoint, unless a weight is not finite: such a checkpoint would replace a good one."""
        self.watchdog.enter(f"the checkpoint after step {self.step}, whose predecessor may still be written")
        tensors = contents.model_tensors(self.model)
        bad = [key.removeprefix(MODEL) for key, value in tensors.items() if not _local(value).isfinite().all()]
        if any_bad := [name for names in self.ranks.gathered(bad[:1]) for name in names]:
            raise self._not_finite(f"the weight {any_bad[0]} is not finite after step {self.step}")
        metrics.flush_to_disk()
        for part in self.stepper.parts:
            tensors |= contents.optimizer_tensors(part, self._names)
        tensors[f"{RANDOM}{self.ranks.rank}"] = packed(random_state())
        values: dict[str, Any] = {
            "step": self.step,
            "seconds": self.seconds,
            "measures": self.measures,
            "param_groups": [contents.optimizer_groups(part, self._names) for part in self.stepper.parts],
            "tied": contents.tied_names(self.model),
            "schedulers": self.stepper.schedules_state(),
            "scaler": self.stepper.scaling.state_dict(),
            "next_sequence": self.step * self.config.num_accumulation_steps * self.config.batch_size,
            "data": self.task.fingerprint,
            "config": self._config_dict,
            "num_processes": self.ranks.size,
            "versions": {"torch": str(torch.__version__), "numpy": np.__version__},
        }
        self._saver.save(self.step, Contents(tensors, values))

    def _load(self, path: Any) -> None:
        values = loader.read_values(path)
        if values["data"] != self.task.fingerprint:
            raise InputError(
                f"the data of {self.folder.path} changed since the run began; restore it, or start a new run "
                f"({changed_lines(values['data'], self.task.fingerprint)})"
            )
        stored = dcp.stored_tensors(path)
        tensors = contents.model_tensors(self.model)
        for part in self.stepper.parts:
            tensors |= contents.destinations(part, self._names, stored)
        own_random = f"{RANDOM}{self.ranks.rank}"
        if own_random in stored:  # otherwise this process is new, and keeps the seed of its share
            tensors[own_random] = torch.empty(stored[own_random].shape, dtype=torch.uint8)
        loader.read_into(path, tensors, self.ranks)
        for part, groups in zip(self.stepper.parts, values["param_groups"], strict=True):
            contents.load_optimizer(part, self._names, tensors, groups)
        self.stepper.load_schedules(values["schedulers"])
        if scaler := values.get("scaler"):
            self.stepper.scaling.load_state_dict(scaler)
        elif self.stepper.scaling.is_enabled and self.ranks.is_first:
            print(f"{path} is not of a run in fp16; the scale of the loss begins anew.", file=sys.stderr)
        self.step, self.seconds, self.measures = values["step"], values["seconds"], values["measures"]
        if own_random in tensors:
            restore_random_state(unpacked(tensors[own_random]))

    def autocast(self) -> torch.autocast:
        dtype = self.config.autocast_dtype
        return torch.autocast(torch.device(self.ranks.device).type, dtype, enabled=dtype is not None)

    def _not_finite(self, what: str, remedies: str = "") -> DivergenceError:
        self._saver.wait()
        good = next(iter(folders.newest_first(self.folder.checkpoints)), None)
        return DivergenceError(
            f"{what}; the last good checkpoint is "
            f"{good or 'none, it failed before the first was due'}. "
            f"Try {remedies}a lower --optimizer.lr or a larger --train.warmup-fraction"
        )


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
