"""What the runs come to: the results a report shows, before any of it is drawn or written."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from mars_lab.errors import InputError
from mars_lab.report import settings as grouping
from mars_lab.report.published import Published, published
from mars_lab.report.run_record import RunRecord
from mars_lab.report.sensitivity import Sensitivity, sensitivities
from mars_lab.report.settings import Setting, differing
from mars_lab.report.token_ratio import TokenRatio, token_ratio

_DEFAULT_BASELINE = "adamw"


@dataclass(frozen=True)
class Result:
    """An optimizer at the setting that stands for it. `accuracies` are the last `val_accuracy` of each run."""

    setting: Setting
    ratio: TokenRatio | None
    tokens: float
    tokens_per_second: float | None
    memory_mib: float | None
    accuracies: list[float]
    published: Published | None


@dataclass(frozen=True)
class Findings:
    """`results` in rising order of loss; `notes` are sentences on what to keep in mind."""

    runs: list[RunRecord]
    settings: list[Setting]
    results: list[Result]
    baseline: str | None
    sensitivities: list[Sensitivity]
    notes: list[str]

    @property
    def unit(self) -> str:
        """What the runs are counted in."""
        kinds = {"images" if "dataset" in run.config.get("task", {}).get("data", {}) else "tokens" for run in self.runs}
        return " or ".join(sorted(kinds, reverse=True))

    @property
    def optimizers(self) -> list[str]:
        """All of them, those with results first and in their order: their colours and marks go by it."""
        ranked = [result.setting.optimizer for result in self.results]
        return list(dict.fromkeys([*ranked, *(setting.optimizer for setting in self.settings)]))


def findings(runs: Sequence[RunRecord], baseline: str | None = None) -> Findings:
    """What `runs` come to, measured against the optimizer `baseline` (by default adamw, where it is among them).

    Raises:
        InputError: no run has anything to show, or no finished run is of the baseline that was asked for.
    """
    shown = [run for run in runs if run.state != "empty"]
    if not shown:
        raise InputError(
            f"none of the {len(runs)} runs has taken a step ({', '.join(run.name for run in runs[:5])}); train first"
        )
    settings = grouping.group(shown)
    best = grouping.best(settings)
    if baseline is not None and baseline not in best:
        raise InputError(f"no finished run of the baseline {baseline!r}; finished: {', '.join(best) or 'none'}")
    if baseline is None and _DEFAULT_BASELINE in best:
        baseline = _DEFAULT_BASELINE
    results = [_result(setting, best[baseline] if baseline else None) for setting in best.values()]
    found = sensitivities(settings)
    return Findings(shown, settings, results, baseline, found, _notes(runs, best, found))


def _result(setting: Setting, baseline: Setting | None) -> Result:
    finished = [run for run in setting.runs if run.final_loss is not None]
    speeds = [run.tokens_per_second for run in finished if run.tokens_per_second is not None]
    memory = [run.memory_mib for run in finished if run.memory_mib is not None]
    accuracies = [float(run.curves["val_accuracy"].value[-1]) for run in finished if "val_accuracy" in run.curves]
    return Result(
        setting,
        None if baseline is None or baseline is setting else token_ratio(setting, baseline),
        tokens=finished[0].tokens,
        tokens_per_second=median(speeds) if speeds else None,
        memory_mib=max(memory, default=None),
        accuracies=accuracies,
        published=published(finished[0].config, setting.optimizer, finished[0].tokens),
    )


def _notes(runs: Sequence[RunRecord], best: dict[str, Setting], found: list[Sensitivity]) -> list[str]:
    notes: list[str] = []
    for state, what in (
        ("empty", "have taken no step yet and are not shown"),
        ("unfinished", "are not finished: shown as curves, in no table of results"),
        ("diverged", "diverged (the loss or a weight was not finite any more)"),
        ("pruned", "were pruned: ended early by the sweep because others were better"),
    ):
        if names := [run.name for run in runs if run.state == state]:
            listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            notes.append(f"{len(names)} of {len(runs)} runs {what}: {listed}.")
    if unequal := sorted(differing([setting.circumstances for setting in best.values()])):
        notes.append(
            f"The optimizers were not run alike; they differ in {', '.join(unequal)}. Compare their losses with care."
        )
    counts = {len(setting.finals) for setting in best.values()}
    if counts and min(counts) < 2:
        notes.append("Some results rest on one seed: no spread and no interval can be given for them.")
    notes += [_edge_note(sensitivity, best) for sensitivity in found]
    return [note for note in notes if note]


def _edge_note(sensitivity: Sensitivity, best: dict[str, Setting]) -> str:
    at_edge: list[str] = []
    for optimizer, points in sensitivity.lines.items():
        reached = [point for point in points if point.mean is not None]
        lowest = min(reached, key=lambda point: point.mean or 0.0, default=None)
        if lowest is not None and optimizer in best and lowest in (points[0], points[-1]):
            at_edge.append(optimizer)
    if not at_edge:
        return ""
    return (
        f"The best {sensitivity.name} tried is the smallest or largest of its grid for {', '.join(at_edge)}: "
        "a wider grid may find a better one."
    )
