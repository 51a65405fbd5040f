"""Tuning several optimizers with equal budgets, and running each at its best with several seeds.

The runs are done by worker processes that take them from a queue in the sweep's folder; more workers, on this machine
or on others that see the folder, can join at any time, and any of them can be killed.
"""

from rich.console import Console

from mars_lab.report import command as report
from mars_lab.report import discovery
from mars_lab.report.findings import Findings, findings
from mars_lab.report.run_record import TUNING_FOLDER
from mars_lab.sweep import budget, workers
from mars_lab.sweep import plan as plans
from mars_lab.sweep.plan import FINAL_FOLDER, Plan
from mars_lab.sweep.progress import Expected, RunsProgress
from mars_lab.sweep.studies import Studies
from mars_lab.training import launch


def sweep(plan: Plan, num_workers: int) -> Findings:
    """Do what is left of `plan` with `num_workers` processes, and write the report.

    Raises:
        InputError: the data or the storage cannot be used, or the folder holds another sweep.
        Interrupted: Ctrl-C or SIGTERM; the runs under way have been saved.
        TrainingError: a worker failed.
    """
    first = next(iter(plan.optimizers))
    launch.prepare(plan.run_config(first, {}))  # mistakes are better said once than by every worker
    plans.begin(plan)
    studies = Studies(plan)
    for name in plan.optimizers:
        studies.trials(name)  # makes the study, before workers do so at once
    num_steps = plan.config.base.train.num_steps
    with RunsProgress([Expected(folder, num_steps) for folder in plan.all_runs]) as progress:
        workers.run("mars_lab.sweep.worker", plan.folder, num_workers, progress.update)
    return _report(plan, studies)


def _report(plan: Plan, studies: Studies) -> Findings:
    places = [plan.folder / part for part in (TUNING_FOLDER, FINAL_FOLDER) if (plan.folder / part).is_dir()]
    found = findings(discovery.read_all(discovery.find(places), Console()))
    extra = (budget.HEADING, budget.table(plan, studies), budget.NOTE)
    report.write(found, plan.folder, f"Sweep {plan.folder.resolve().name}", [extra])
    return found
