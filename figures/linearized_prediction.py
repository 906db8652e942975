"""Predictions of kernel regression and of trained networks, by size of the training set.

Agreement is the share of rows to which a network and the regression under its kernel give the same class. It is drawn
beside the agreement of two classifiers with the same accuracies and independent errors. Black is a network that was
trained again with another data order. Initial logits are subtracted from logits; the sign-gradient kernel is
dash-dotted. Bars are shifted sideways so that they do not overlap, and cut at the ends of a panel.
"""

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analyses.records import Result
from figures.figure import figure
from figures.methods import color_of_line, short
from figures.style import PAGE_WIDTH

_HEIGHT = 2.9
# Names of predictors in the results of the analysis.
REGRESSION, SIGN, AGAIN = "kernel regression", "sign kernel regression", "trained again"
_NULLS = {"null: hidden states": "o", "null: majority class": "x", "null: permuted labels": "s"}
"""Markers of the null models, whose lines are dotted."""
_TRAINED, _REGRESSION, _SIGN, _CHANCE, _AGAIN = "o", "D", "^", "_", "*"
_MARGIN = 0.08
_SHIFT = 0.06  # Sideways shift between neighbouring methods, in natural logarithms of the size.


@figure("linearized_prediction")
def draw(result: Result) -> Figure:
    """Trained networks (solid), regression under their kernels (dashed) and nulls (dotted) by training-set size: score;
    agreement of network and kernel beside that of independent errors (thin dotted); correlation of logits. Bars are 95
    % Student intervals over seeds.
    """
    methods = [row["method"] for row in result.tables["methods"]]
    sizes = [row["size"] for row in result.tables["sizes"]]
    colors = {method: color_of_line(place) for place, method in enumerate(methods)}
    lines = _Lines(result, sizes)
    page = Figure(figsize=(PAGE_WIDTH, _HEIGHT), layout="constrained")
    score, agreement, correlation = page.subplots(1, 3)
    for place, (method, color) in enumerate(colors.items()):
        shift = place - (len(methods) - 1) / 2
        lines.draw(score, "score", f"trained: {method}", "", shift, color=color, marker=_TRAINED)
        kernel: dict[str, Any] = {"color": color, "linestyle": "--", "marker": _REGRESSION}
        lines.draw(score, "score", f"kernel: {method}", "", shift, **kernel)
        lines.draw(agreement, "prediction_agreement", method, REGRESSION, shift, **kernel)
        lines.draw(agreement, "independent_errors_agreement", method, REGRESSION, shift, bars=False, color=color,
                   linestyle=":", linewidth=0.9, marker=_CHANCE, markersize=6)  # fmt: skip
        lines.draw(correlation, "logit_correlation", method, REGRESSION, shift, **kernel)
        lines.draw(correlation, "logit_correlation", method, SIGN, shift, color=color, linestyle="-.", marker=_SIGN)
    for name, marker in _NULLS.items():
        lines.draw(score, "score", name, "", 0, bars=False, color="0.5", linestyle=":", marker=marker)
    for panel, prefix in ((agreement, "trained_agreement"), (correlation, "trained_logit_correlation")):
        for method in methods:
            lines.draw(panel, prefix, method, AGAIN, 0, color="black", linestyle="-", linewidth=0.9, marker=_AGAIN)
    for panel, title in (
        (score, f"{result.dataset['metric']}, held-out rows"),
        (agreement, "agreement of network and kernel"),
        (correlation, "correlation of logits"),
    ):
        panel.set(xscale="log", title=title, xlabel="training rows")
        panel.set_xticks(sizes, [str(size) for size in sizes])
        panel.minorticks_off()
        if len(sizes) == 1:
            panel.set_xlim(sizes[0] / 1.5, sizes[0] * 1.5)
        panel.grid(color="0.9", linewidth=0.5)
        # By the values alone, since Student's intervals of two or three seeds may exceed the quantity's range.
        if values := lines.values.get(panel):  # Without trained networks there is no agreement with them.
            panel.set_ylim(min(values) - _MARGIN, max(values) + _MARGIN)
    page.legend(handles=_legend(colors, result), loc="outside lower center", ncols=4)
    return page


class _Lines:
    """Draws metrics of a result against the size of the training set."""

    def __init__(self, result: Result, sizes: list[int]):
        self._result, self._sizes = result, sizes
        self.values: dict[Axes, list[float]] = {}

    def draw(
        self, axes: Axes, name: str, left: str, right: str, shift: float, *, bars: bool = True, **look: object
    ) -> None:
        """Draw one line with error bars through the sizes at which the result holds the metric with a finite value."""
        points = [(size, self._result.find(name, stage=f"n={size}", left=left, right=right)) for size in self._sizes]
        kept = [(size, m) for size, m in points if m is not None and math.isfinite(m.value)]
        if not kept:
            return
        x = np.array([size for size, _ in kept]) * math.exp(_SHIFT * shift)
        y = np.array([m.value for _, m in kept])
        self.values.setdefault(axes, []).extend(y.tolist())
        ends = np.array([[_distance(m.value, m.low), _distance(m.value, m.high)] for _, m in kept]).T
        options = {"markersize": 3, "linewidth": 1.2, "elinewidth": 0.6} | look
        axes.errorbar(x, y, yerr=ends if bars else None, **options)  # pyright: ignore[reportArgumentType]


def _distance(value: float, end: float | None) -> float:
    return 0.0 if end is None or not math.isfinite(end) else abs(end - value)


def _legend(colors: dict[str, str], result: Result) -> list[Line2D]:
    handles = [Line2D([], [], color=color, label=short(method)) for method, color in colors.items()]
    gray = {"color": "0.35", "markersize": 3}
    handles += [
        Line2D([], [], linestyle="-", marker=_TRAINED, label="trained network", **gray),
        Line2D([], [], linestyle="--", marker=_REGRESSION, label="kernel regression", **gray),
        Line2D([], [], linestyle="-.", marker=_SIGN, label="sign-gradient kernel", **gray),
        Line2D([], [], linestyle=":", marker=_CHANCE, label="independent errors", linewidth=0.9, color="0.35"),
    ]
    handles += [
        Line2D([], [], color="0.5", linestyle=":", marker=marker, markersize=3, label=name.removeprefix("null: "))
        for name, marker in _NULLS.items()
    ]
    if any(m.right == AGAIN for m in result.metrics):
        handles.append(
            Line2D([], [], color="black", linewidth=0.9, marker=_AGAIN, markersize=3, label="network trained again")
        )
    return handles


write = draw.write

if __name__ == "__main__":
    draw.command(__doc__)
