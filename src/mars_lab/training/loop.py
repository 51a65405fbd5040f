"""The training loop. It knows a `Task`, a configuration and a folder, and nothing of language."""

import json
from contextlib import ExitStack
from typing import Any

import torch

from mars_lab.ranks import Ranks
from mars_lab.report import loss_curve
from mars_lab.tasks.task import Task
from mars_lab.training.checkpoint.saver import Saver
from mars_lab.training.config import RunConfig
from mars_lab.training.interruption import Interrupted, Interruption
from mars_lab.training.metrics import Metrics
from mars_lab.training.processes import Processes
from mars_lab.training.progress import RunProgress
from mars_lab.training.run import Run
from mars_lab.training.run_folder import RunFolder
from mars_lab.training.watchdog import Watchdog


def train(
    task: Task,
    config: RunConfig,
    folder: RunFolder,
    *,
    quiet: bool = False,
    processes: Processes | None = None,
) -> dict[str, Any]:
    """Train to the end, from the newest checkpoint in `folder` if there is one, and return the summary.

    A run that was stopped at any moment and continued by this function has the same weights, optimizer state and
    losses, bit for bit, as one that never stopped (on the same machine, with the same numbers of threads and of
    processes). All of `processes` call it, with the same arguments; the first writes.

    Raises:
        Interrupted: Ctrl-C or SIGTERM, on any process; the state has been saved.
        TrainingError: the loss or a weight is not finite, or a checkpoint could not be written.
        InputError: the data changed since the run began, or no checkpoint is readable.
    """
    processes = processes or Processes(Ranks(device=config.train.device))
    ranks, last = processes.ranks, config.train.num_steps
    with ExitStack() as stack:
        if ranks.is_first:
            stack.enter_context(folder.locked(patience=60 if ranks.size > 1 else 0))
        watchdog = stack.enter_context(Watchdog(ranks, config.train.timeout))
        watchdog.enter("building the model and reading the checkpoint")
        saver = stack.enter_context(Saver(folder.checkpoints, ranks, num_kept=config.train.num_checkpoints))
        interruption = stack.enter_context(Interruption())
        run = Run(task, config, folder, processes=processes, saver=saver, watchdog=watchdog, interruption=interruption)
        if ranks.is_first:
            folder.write("groups.txt", run.stepper.audit + "\n")
        metrics = stack.enter_context(Metrics(folder, run.step, writes=ranks.is_first, wandb=config.train.wandb))
        progress = stack.enter_context(RunProgress(last, run.step, unit=task.unit, quiet=quiet, shows=ranks.is_first))
        if run.step == 0:
            run.evaluate(metrics, progress)
        while run.step < last:
            run.take_step(metrics, progress)
            if run.step % config.train.eval_every == 0 or run.step == last:
                run.evaluate(metrics, progress)
            if run.step % config.train.checkpoint_every == 0 or run.step == last or run.stop:
                run.save(metrics)
            if run.stop and run.step < last:
                break
        watchdog.enter("waiting for the checkpoint to be written")
        saver.wait()
        if run.step < last:
            raise Interrupted(f"stopped after step {run.step} and saved", run.stop)
        return _finish(run, folder)


def _finish(run: Run, folder: RunFolder) -> dict[str, Any]:
    """Write the figure, the sample and, last, the summary, which marks the run as finished."""
    run.watchdog.enter("writing the sample")
    with run.autocast():
        sample = run.task.sample(run.model, run.ranks.device)
    summary = {
        **run.measures,
        "steps": run.step,
        "tokens": run.tokens,
        "seconds": run.seconds,
        "gradient_evaluations_per_step": run.stepper.gradient_evaluations,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "torch": torch.__version__,
    }
    if run.ranks.is_first:
        loss_curve.draw(folder.metrics, folder.path / "loss", title=folder.path.name, unit=run.task.unit)
        folder.write("sample.txt", sample + "\n")
        folder.write("summary.json", json.dumps(summary, indent=2) + "\n")
    return summary
