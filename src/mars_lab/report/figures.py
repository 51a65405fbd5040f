"""The figures of a report for papers and slides: PNG and SVG."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from mars_lab.report.curve import Array
from mars_lab.report.findings import Findings, Result
from mars_lab.report.run_record import VALIDATION_LOSS
from mars_lab.report.sensitivity import Sensitivity
from mars_lab.report.style import TOKENS, label_ends, line_style, new_figure, save

_AXES = {"tokens": "training tokens", "steps": "steps", "seconds": "seconds in training steps"}


def draw(findings: Findings, folder: Path) -> list[str]:
    """Every figure of `findings` into `folder`; their names, without suffix."""
    names: list[str] = []
    if findings.results:
        _draw_losses(findings, folder / "loss")
        names.append("loss")
    for sensitivity in findings.sensitivities:
        names.append(f"sensitivity-{sensitivity.name}")
        _draw_sensitivity(findings, sensitivity, folder / names[-1])
    return names


def _draw_losses(findings: Findings, stem: Path) -> None:
    """Mean over seeds, the band from the lowest to the highest, of each optimizer at the setting it stands at."""
    figure = new_figure(15.0, 5.2)
    panels = figure.subplots(1, len(_AXES), sharey=True)
    averages = [_average(result) for result in findings.results]
    ends = [float(average["loss"][-1]) for average in averages]
    # The first half, where every loss falls from chance, would flatten the part that differs.
    ceiling = max(float(average["loss"][len(average["loss"]) // 2]) for average in averages)
    labels = {**_AXES, "tokens": f"training {findings.unit}"}
    for axes, (key, label) in zip(panels, labels.items(), strict=True):
        named: list[tuple[str, str, float, float]] = []
        for result, average, end in zip(findings.results, averages, ends, strict=True):
            style = line_style(findings.optimizers, result.setting.optimizer)
            axes.fill_between(
                average[key], average["lowest"], average["highest"], color=style["color"], alpha=0.15, linewidth=0
            )
            axes.plot(average[key], average["loss"], markevery=max(1, len(average[key]) // 8), **style)
            named.append((result.setting.optimizer, style["color"], float(average[key][-1]), end))
        axes.set_ylim(min(ends) - 0.08 * (ceiling - min(ends)), ceiling + 0.02)
        label_ends(axes, named)
        axes.set_xlabel(label)
        axes.xaxis.set_major_formatter(TOKENS)
    panels[0].set_ylabel("validation loss")
    save(figure, stem)


def _average(result: Result) -> dict[str, Array]:
    """Over the finished seeds; where their evaluations were at other steps, the first alone."""
    curves = [run.curves[VALIDATION_LOSS] for run in result.setting.runs if run.final_loss is not None]
    curves = [curve for curve in curves if np.array_equal(curve.steps, curves[0].steps)]
    values = np.stack([curve.value for curve in curves])
    return {
        "tokens": curves[0].tokens,
        "steps": curves[0].steps,
        "seconds": np.mean([curve.seconds for curve in curves], axis=0),
        "loss": values.mean(axis=0),
        "lowest": values.min(axis=0),
        "highest": values.max(axis=0),
    }


def _draw_sensitivity(findings: Findings, sensitivity: Sensitivity, stem: Path) -> None:
    figure = new_figure(7.0, 4.6)
    axes = figure.subplots()
    for optimizer in sorted(sensitivity.lines, key=findings.optimizers.index):
        points = sensitivity.lines[optimizer]
        reached = [(p.x, p.mean, p.lowest, p.highest) for p in points if p.mean is not None]
        if not reached:
            continue
        x, mean, lowest, highest = np.array(reached, dtype=np.float64).T
        style = line_style(findings.optimizers, optimizer)
        axes.errorbar(x, mean, (mean - lowest, highest - mean), label=optimizer, capsize=2, **style)
    _set_scale(axes, sorted({point.x for points in sensitivity.lines.values() for point in points}))
    axes.set_xlabel(sensitivity.name)
    axes.set_ylabel("final validation loss")
    figure.legend(frameon=False, loc="outside right upper")
    save(figure, stem)


def _set_scale(axes: Axes, ticks: list[float]) -> None:
    if ticks[0] <= 0:
        return
    axes.set_xscale("log")
    if len(ticks) <= 8:
        axes.set_xticks(ticks)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
