"""What the tuning of each optimizer cost, checked to be the same."""

from optuna.trial import TrialState

from mars_lab.report.rows import read_rows
from mars_lab.report.tables import Table
from mars_lab.sweep.plan import Plan
from mars_lab.sweep.studies import DIVERGED, Studies
from mars_lab.sweep.worker import COSTS
from mars_lab.tasks.vision import VisionConfig

HEADING = "Budget of the tuning"
NOTE = (
    "Each optimizer was given the same number of trials of the same number of steps and tokens; trials that diverged "
    "or were pruned ended earlier. Gradients are evaluations a step. Processor seconds are of all threads, evaluation "
    "and start included; an attempt that was killed is not in them."
)


def table(plan: Plan, studies: Studies) -> Table:
    """An optimizer a row."""
    headings = [
        "optimizer",
        "trials",
        "diverged",
        "pruned",
        "steps",
        "images" if isinstance(plan.config.base.task, VisionConfig) else "tokens",
        "gradients",
        "processor seconds",
        "best",
    ]
    rows = [_row(plan, studies, name) for name in plan.optimizers]
    return Table(headings, rows, numeric=(1, 2, 3, 4, 5, 6, 7))


def _row(plan: Plan, studies: Studies, name: str) -> list[str]:
    trials = studies.trials(name)
    assert len(trials) == plan.num_trials, "the queue hands out equally many"
    folders = [plan.tuning_run(name, trial.number) for trial in trials]
    last = [rows[-1] for folder in folders if (rows := read_rows(folder.metrics))]
    costs = [row["processor_seconds"] for folder in folders for row in read_rows(folder.path / COSTS)]
    best = studies.best(name)
    return [
        name,
        str(len(trials)),
        str(sum(trial.value == DIVERGED for trial in trials)),
        str(sum(trial.state == TrialState.PRUNED for trial in trials)),
        f"{sum(row['step'] for row in last):,}",
        f"{sum(row['tokens'] for row in last):,}",
        "2" if plan.optimizers[name].mode == "exact" else "1",
        f"{sum(costs):,.0f}",
        "none" if best is None else ", ".join(f"{field} {value:g}" for field, value in best.items()),
    ]
