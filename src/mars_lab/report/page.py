"""The report as one HTML page: no other file, no network.

Charts are a few hundred lines of our own on a canvas (`assets/`): a plotting library of several megabytes would take
longer to start than the page may take to open.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from mars_lab.report import tables
from mars_lab.report.curve import Curve
from mars_lab.report.findings import Findings
from mars_lab.report.run_record import VALIDATION_LOSS
from mars_lab.report.sensitivity import Point
from mars_lab.report.style import hollow, line_index
from mars_lab.report.tables import Table

POINTS_SHOWN = 120_000
"""Of all curves together: what a browser reads and draws well within a second."""
MOST_POINTS_OF_A_CURVE = 2000
_FEW_RUNS = 12
"""That can be told apart in one chart; of more only those of the table of results are shown at first."""
_MOST_TICKS = 6
_ASSETS = files("mars_lab.report") / "assets"
_SCRIPTS = ("axes.js", "chart.js", "page.js")
_METRICS = {"val_loss": "validation loss", "val_accuracy": "validation accuracy", "loss": "training loss"}


def render(findings: Findings, title: str, made: str, extra: Sequence[tuple[str, Table, str]] = ()) -> str:
    """The page.

    Args:
        findings: what it shows.
        title: its heading.
        made: when, in words.
        extra: further tables: heading, table, and a sentence below it.
    """
    metrics = _metrics(findings)
    num_points = max(len(curve) for run in findings.runs for curve in run.curves.values())
    shown = _points_of_a_curve(findings)
    data = _data(findings, metrics, shown)
    template = Template((_ASSETS / "page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(title),
        subtitle=escape(_subtitle(findings, made)),
        style=(_ASSETS / "page.css").read_text(encoding="utf-8"),
        script="\n".join((_ASSETS / name).read_text(encoding="utf-8") for name in _SCRIPTS),
        data=_script_safe(json.dumps(data, separators=(",", ":"), allow_nan=False)),
        notes="".join(f"<li>{escape(note)}</li>" for note in findings.notes),
        notes_hidden="" if findings.notes else "hidden",
        results=_html(tables.results(findings)) if findings.results else "<p>No run is finished yet.</p>",
        metrics="".join(_radio("metric", key, label, i == 0) for i, (key, label) in enumerate(metrics.items())),
        thinning=escape(_thinning(num_points, shown)),
        sensitivities="".join(_sensitivity(i, s.name) for i, s in enumerate(findings.sensitivities)),
        sensitivities_hidden="" if findings.sensitivities else "hidden",
        extra="".join(f"<h2>{escape(h)}</h2>{_html(t)}<p class=muted>{escape(note)}</p>" for h, t, note in extra),
        settings=_html(tables.every_setting(findings)),
        runs=_html(tables.every_run(findings)),
        hidden=_hidden(data),
        unit=findings.unit,
        baseline=escape(findings.baseline or "the baseline"),
        ratio_hidden="" if findings.baseline and len(findings.results) > 1 else "hidden",
    )


def _subtitle(findings: Findings, made: str) -> str:
    seeds = len({run.seed for run in findings.runs})
    return f"{len(findings.runs)} runs, {len(findings.optimizers)} optimizers, {seeds} seeds. Made {made}."


def _metrics(findings: Findings) -> dict[str, str]:
    keys = dict.fromkeys(key for run in findings.runs for key in run.curves)
    return {key: _METRICS.get(key, key) for key in sorted(keys, key=lambda k: (k != VALIDATION_LOSS, k == "loss", k))}


def _points_of_a_curve(findings: Findings) -> int:
    num_curves = sum(len(run.curves) for run in findings.runs)
    return max(20, min(MOST_POINTS_OF_A_CURVE, POINTS_SHOWN // num_curves))


def _data(findings: Findings, metrics: dict[str, str], num_points: int) -> dict[str, Any]:
    optimizers = findings.optimizers
    chosen = {run.name for result in findings.results for run in result.setting.runs}
    labels = {run.name: setting.label for setting in findings.settings for run in setting.runs}
    ordered = sorted(findings.runs, key=lambda run: (optimizers.index(run.optimizer), run.name not in chosen))
    # By optimizer its settings; the first, whose line is solid, is the chosen one.
    dashes: dict[str, list[str]] = defaultdict(list)
    runs: list[dict[str, Any]] = []
    for run in ordered:
        if labels[run.name] not in dashes[run.optimizer]:
            dashes[run.optimizer].append(labels[run.name])
        runs.append(
            {
                "label": f"{labels[run.name]}, seed {run.seed}",
                "optimizer": run.optimizer,
                "visible": run.name in chosen or run.state == "unfinished" or len(findings.runs) <= _FEW_RUNS,
                "dash": dashes[run.optimizer].index(labels[run.name]),
                **_style(optimizers, run.optimizer),
                "curves": {key: _columns(run.curves[key].thinned(num_points)) for key in metrics if key in run.curves},
            }
        )
    return {
        "unit": findings.unit,
        "metrics": metrics,
        "runs": runs,
        "sensitivities": [_lines(findings, i) for i in range(len(findings.sensitivities))],
    }


def _lines(findings: Findings, index: int) -> dict[str, Any]:
    sensitivity = findings.sensitivities[index]
    lines = [
        {"label": name, "dash": 0, **_style(findings.optimizers, name), **_points(sensitivity.lines[name])}
        for name in sorted(sensitivity.lines, key=findings.optimizers.index)
    ]
    values = sorted({x for line in lines for x in line["x"]})
    ticks = values if len(values) <= _MOST_TICKS else None
    return {"name": sensitivity.name, "isLog": bool(values) and values[0] > 0, "ticks": ticks, "lines": lines}


def _points(points: Sequence[Point]) -> dict[str, Any]:
    reached = [point for point in points if point.mean is not None]
    return {
        "x": [point.x for point in reached],
        "y": [point.mean for point in reached],
        "low": [point.lowest for point in reached],
        "high": [point.highest for point in reached],
    }


def _style(optimizers: list[str], optimizer: str) -> dict[str, Any]:
    index = line_index(optimizers, optimizer)
    return {"color": index % 8, "marker": index, "hollow": hollow(optimizer)}


def _columns(curve: Curve) -> list[list[float]]:
    return [_rounded(column) for column in (curve.steps, curve.tokens, curve.seconds, curve.value)]


def _rounded(column: Any) -> list[float]:
    """Six digits, and whole numbers as such: more than a screen shows, and half the page."""
    values = [float(f"{value:.6g}") for value in column.tolist()]
    return [int(value) if value.is_integer() else value for value in values]


def _hidden(data: dict[str, Any]) -> str:
    count = sum(not run["visible"] for run in data["runs"])
    return f"{count} of {len(data['runs'])} runs are hidden at first; the switches show them." if count else ""


def _thinning(num_points: int, shown: int) -> str:
    if num_points <= shown:
        return "Every measured point is drawn."
    return (
        f"Curves of more than {shown:,} points are thinned for display: each stretch of equally many points is drawn "
        "by its lowest and highest, so that every peak and trough stays. Tables are computed from all points."
    )


def _radio(group: str, value: str, label: str, is_checked: bool) -> str:
    checked = " checked" if is_checked else ""
    return f'<label><input type="radio" name="{group}" value="{escape(value)}"{checked}>{escape(label)}</label>'


def _sensitivity(index: int, name: str) -> str:
    return (
        f'<figure><figcaption>final validation loss against {escape(name)}</figcaption><div class="chart" '
        f'id="sensitivity-{index}"></div><ul class="keys row" id="keys-{index}"></ul></figure>'
    )


def _html(table: Table) -> str:
    def row(cells: list[str], tag: str) -> str:
        parts = (
            f"<{tag}{' class=number' if i in table.numeric else ''}>{escape(cell)}</{tag}>"
            for i, cell in enumerate(cells)
        )
        return f"<tr>{''.join(parts)}</tr>"

    body = "".join(row(cells, "td") for cells in table.rows)
    return f'<div class="wide"><table><thead>{row(table.headings, "th")}</thead><tbody>{body}</tbody></table></div>'


def _script_safe(text: str) -> str:
    """JSON that cannot end the script element it stands in."""
    return text.replace("<", "\\u003c")
