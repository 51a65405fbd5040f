"""The tables of a report, as headings and rows of plain text."""

import math
from dataclasses import dataclass
from statistics import fmean, stdev

from mars_lab.report.findings import Findings, Result
from mars_lab.report.settings import Setting
from mars_lab.report.token_ratio import CONFIDENCE, TokenRatio


@dataclass(frozen=True)
class Table:
    """`numeric` are the indices of the columns that are aligned to the right."""

    headings: list[str]
    rows: list[list[str]]
    numeric: tuple[int, ...]

    def without_empty_columns(self) -> "Table":
        """The same without columns that say nothing in any row."""
        kept = [i for i in range(len(self.headings)) if any(row[i] for row in self.rows)]
        return Table(
            [self.headings[i] for i in kept],
            [[row[i] for i in kept] for row in self.rows],
            tuple(new for new, old in enumerate(kept) if old in self.numeric),
        )

    def markdown(self) -> str:
        """As a Markdown table."""
        ruler = ["---:" if i in self.numeric else "---" for i in range(len(self.headings))]
        return "".join(f"| {' | '.join(row)} |\n" for row in (self.headings, ruler, *self.rows))


def results(findings: Findings) -> Table:
    """An optimizer a row, the lowest loss first."""
    headings = [
        "optimizer and setting",
        "seeds",
        "validation loss",
        "accuracy",
        f"{findings.unit} to {findings.baseline}'s loss",
        f"{CONFIDENCE:.0%} interval",
        f"{findings.unit}/s",
        "memory, MiB",
        "published loss",
        "published accuracy",
        "published where",
    ]
    rows = [_result_row(result, result.setting.optimizer == findings.baseline) for result in findings.results]
    return Table(headings, rows, numeric=tuple(range(1, len(headings) - 1))).without_empty_columns()


def _result_row(result: Result, is_baseline: bool) -> list[str]:
    setting, ratio = result.setting, result.ratio
    return [
        setting.label,
        str(len(setting.finals)),
        _mean_and_spread(setting),
        _accuracy(result.accuracies),
        "1 (baseline)" if is_baseline else "" if ratio is None else _ratio(ratio.ratio),
        "" if ratio is None else _interval(ratio),
        "" if result.tokens_per_second is None else f"{result.tokens_per_second:,.0f}",
        "" if result.memory_mib is None else f"{result.memory_mib:,.0f}",
        "" if result.published is None else f"{result.published.loss:g}",
        "" if result.published is None or result.published.accuracy is None else f"{result.published.accuracy:g}%",
        "" if result.published is None else result.published.where,
    ]


def every_setting(findings: Findings) -> Table:
    """A setting a row, in the order of the runs."""
    rows = [
        [
            setting.label,
            str(len(setting.runs)),
            " ".join(str(run.seed) for run in setting.runs),
            _mean_and_spread(setting),
            ", ".join(sorted({run.state for run in setting.runs} - {"finished"})),
        ]
        for setting in findings.settings
    ]
    headings = ["setting", "runs", "seeds", "validation loss", "state"]
    return Table(headings, rows, numeric=(1, 3)).without_empty_columns()


def every_run(findings: Findings) -> Table:
    """A run a row."""
    rows = [
        [
            run.name,
            run.optimizer,
            str(run.seed),
            "" if run.final_loss is None else f"{run.final_loss:.4f}",
            run.state,
            f"{run.tokens:,.0f}",
            f"{run.seconds:,.0f}",
            "" if run.tokens_per_second is None else f"{run.tokens_per_second:,.0f}",
            "" if run.memory_mib is None else f"{run.memory_mib:,.0f}",
        ]
        for run in findings.runs
    ]
    headings = [
        "run",
        "optimizer",
        "seed",
        "validation loss",
        "state",
        findings.unit,
        "seconds in steps",
        f"{findings.unit}/s",
        "memory, MiB",
    ]
    return Table(headings, rows, numeric=(2, 3, 5, 6, 7, 8)).without_empty_columns()


def _mean_and_spread(setting: Setting) -> str:
    if setting.mean is None:
        return ""
    return f"{setting.mean:.4f}" + ("" if setting.spread is None else f" ± {setting.spread:.4f}")


def _accuracy(values: list[float]) -> str:
    if not values:
        return ""
    return f"{fmean(values):.2%}" + (f" ± {stdev(values):.2%}" if len(values) > 1 else "")


def _ratio(ratio: float) -> str:
    return "not reached" if math.isinf(ratio) else f"{ratio:.3f}"


def _interval(ratio: TokenRatio) -> str:
    if ratio.interval is None:
        return "one seed"
    low, high = ratio.interval
    if math.isinf(low):
        return "not reached"
    return f"{low:.3f} to {'not reached' if math.isinf(high) else f'{high:.3f}'}"
