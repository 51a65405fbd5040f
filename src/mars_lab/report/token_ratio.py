"""How many tokens an optimizer needs for the loss at which the baseline ended, relative to the baseline's tokens.

The target is the mean final loss of the baseline's seeds. An optimizer's tokens are where the mean validation curve
of its seeds first is at the target, between two evaluations in proportion. The interval is a percentile bootstrap:
seeds of the baseline and of the optimizer are drawn with replacement, each from its own, and the ratio is computed
anew for every draw, which has the uncertainty of target and curve in it. A draw that never gets there counts as
infinitely many tokens.

With three seeds there are only ten different draws of each, and an interval is as rough as that; it is in general too
narrow. Curves are read before their learning rate has decayed, unlike the baseline's end, so that the ratio favours
the baseline a little.
"""

from dataclasses import dataclass

import numpy as np

from mars_lab.report.curve import Array, Curve
from mars_lab.report.run_record import VALIDATION_LOSS
from mars_lab.report.settings import Setting

NUM_DRAWS = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class TokenRatio:
    """`ratio` below 1 means fewer tokens than the baseline; inf, that the loss was not reached.

    `interval` is None with fewer than two seeds on either side.
    """

    ratio: float
    interval: tuple[float, float] | None


def token_ratio(setting: Setting, baseline: Setting) -> TokenRatio | None:
    """The ratio of `setting` to `baseline`; None where either has no finished run or seeds differ in their steps."""
    curves = [run.curves[VALIDATION_LOSS] for run in setting.runs if run.final_loss is not None]
    targets, budgets = np.array(baseline.finals), [run.tokens for run in baseline.runs if run.final_loss is not None]
    if not curves or not budgets or any(not np.array_equal(curve.tokens, curves[0].tokens) for curve in curves):
        return None
    values, tokens, budget = np.stack([curve.value for curve in curves]), curves[0].tokens, float(np.mean(budgets))
    everyone = np.full((1, len(curves)), 1 / len(curves))
    ratio = _reached(everyone, values, tokens, targets.mean(keepdims=True))[0] / budget
    if len(curves) < 2 or len(targets) < 2:
        return TokenRatio(float(ratio), None)
    generator = np.random.default_rng(0)
    shares = generator.multinomial(len(curves), everyone[0], size=NUM_DRAWS) / len(curves)
    drawn_targets = generator.choice(targets, size=(NUM_DRAWS, len(targets))).mean(axis=1)
    draws = _reached(shares, values, tokens, drawn_targets) / budget
    tail = (1 - CONFIDENCE) / 2
    # Between a number and infinity there is nothing to interpolate.
    low, high = np.quantile(draws, (tail, 1 - tail), method="inverted_cdf")
    return TokenRatio(float(ratio), (float(low), float(high)))


def _reached(shares: Array, values: Array, tokens: Array, targets: Array) -> Array:
    """Tokens at which the averages of the curves `values`, a row of `shares` each, first are at their `targets`."""
    averages = (Curve(tokens, tokens, tokens, share @ values) for share in shares)
    return np.array([curve.reaches(target) for curve, target in zip(averages, targets, strict=True)])
