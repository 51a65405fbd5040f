"""From finished runs to the files of a table or figure: the report's page and figures, and the table."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mars_lab.errors import InputError
from mars_lab.evaluation import command as evaluation
from mars_lab.evaluation.command import EvaluateCommand
from mars_lab.report import command as report
from mars_lab.report import run_record
from mars_lab.report.findings import findings
from mars_lab.report.run_record import RunRecord
from mars_lab.reproduce import outcome
from mars_lab.reproduce.exhibit import MEAN, Exhibit, Quantity, TaskAccuracy
from mars_lab.reproduce.outcome import Answers, Run
from mars_lab.reproduce.plan import PUBLISHED, Plan
from mars_lab.sweep.claim import alone
from mars_lab.tasks.language import LanguageConfig
from mars_lab.training.run_folder import RunFolder

TABLE = "table.json"
_NOTE = (
    "Mean ± sample standard deviation over seeds. A loss or accuracy is the best of the evaluations, as in the papers; "
    "before the end it is read at the evaluation nearest to the same share of the training."
)


@dataclass(frozen=True)
class Questions:
    """What runs are asked at the end: the options of `mars evaluate`."""

    options: EvaluateCommand

    def ask(self, folder: RunFolder) -> Answers:
        """The answers of the run in `folder`, of which those that were given before are not asked for again."""
        print(f"evaluating {folder.path.name}", flush=True)
        found, _ = evaluation.evaluate(replace(self.options, model=str(folder.path)))
        return found.values["shots"]

    @property
    def quantities(self) -> list[Quantity]:
        """What is asked, by number of shots and task."""
        asked: list[Quantity] = []
        for shots in self.options.shots:
            names = [name for name in self.options.names if shots == 0 or name not in evaluation.BOOK_TASKS]
            is_nine = set(names) >= set(evaluation.NINE_TASKS)
            asked += [TaskAccuracy(name, shots) for name in (*names, *([MEAN] if is_nine else []))]
        return asked


def check(plan: Plan, questions: Questions | None) -> None:
    """That the runs can be asked `questions`, before they are trained.

    Raises:
        InputError: they can't.
    """
    if questions is None:
        return
    if not all(isinstance(config.task, LanguageConfig) for config in plan.configs.values()):
        raise InputError(f"{plan.exhibit.name} trains image classifiers, which --tasks can't ask")
    evaluation.check(questions.options)


def write(plan: Plan, questions: Questions | None) -> str:
    """Evaluate where that is asked for, write page, figures and table into the plan's folder; the table, in words.

    Raises:
        InputError: a question can't be asked; or nothing was trained.
    """
    exhibit = plan.exhibit
    runs = {recipe: _runs(plan, recipe, questions) for recipe in plan.recipes}
    quantities = [q for q in exhibit.quantities if not (questions and isinstance(q, TaskAccuracy))]
    found = outcome.cells(exhibit, [*quantities, *(questions.quantities if questions else [])], runs)
    judged = outcome.verdicts(exhibit, found)
    tables = [("Published and here", outcome.table(found), f"{_NOTE} {exhibit.note}".strip())]
    if judged:
        tables.append(("Published orderings", outcome.ordering_table(judged), outcome.summary(judged)))
    shown = findings(list(_labelled(exhibit, runs)))
    title = f"{exhibit.name}: {exhibit.shows} ({exhibit.where})"
    with alone(plan.root):
        report.write(shown, plan.folder, title if plan.scale == PUBLISHED else f"{title}, scale {plan.scale}", tables)
        RunFolder(plan.folder).write(TABLE, json.dumps(outcome.as_json(found, judged), indent=1) + "\n")
    parts = [table.markdown() for _, table, _ in tables]
    return "\n".join([*parts, outcome.summary(judged)])


def _runs(plan: Plan, recipe: str, questions: Questions | None) -> Sequence[Run]:
    folders = [plan.run(recipe, index) for index in range(plan.num_seeds)]
    if plan.num_lrs is not None:  # a recipe all of whose trials diverged has no final runs
        folders = [folder for folder in folders if folder.summary() is not None]
    return [_read(folder, questions) for folder in folders]


def _read(folder: RunFolder, questions: Questions | None) -> Run:
    record = run_record.read(folder.path, folder.path.name)
    is_asked = questions is not None and record.state == "finished"
    return Run(record, questions.ask(folder) if questions is not None and is_asked else {})


def _labelled(exhibit: Exhibit, runs: Mapping[str, Sequence[Run]]) -> Iterator[RunRecord]:
    """For the report: each row under its own name, unless runs are to be grouped by optimizer."""
    for row in exhibit.runs:
        for run in runs[row.recipe]:
            config = run.record.config
            label = {} if exhibit.draws_rates else {"label": exhibit.label(row)}
            name = f"{row.recipe}-seed{run.record.seed}"
            yield replace(run.record, name=name, config={**config, "optimizer": {**config["optimizer"], **label}})
