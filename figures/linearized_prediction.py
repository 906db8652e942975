"""Predictions of kernel regression and of trained networks, by size of the training set.

A column is a method, a row a quantity. Agreement is the share of rows to which a network and the regression under its
kernel give the same class. It is drawn beside the agreement of two classifiers with the same accuracies and independent
errors. Black is a network that was trained again with another data order. Initial logits are subtracted from logits.
Bars are shifted sideways so that they do not overlap, and end at the ends of the values that a quantity can have.
"""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analyses.records import Metric, Result
from figures.figure import figure
from figures.methods import color_of_line, short
from figures.style import PAGE_WIDTH, bar_handle

_ROW_HEIGHT = 1.55
# Names of predictors in the results of the analysis.
REGRESSION, SIGN, AGAIN = "kernel regression", "sign kernel regression", "trained again"
_NULLS = {"null: majority class": "x", "null: permuted labels": "s", "null: hidden states": "v"}
"""Markers of the null models, whose lines are dotted."""
_MARGIN = 0.06
_SHIFT = 0.09  # Sideways shift between neighbouring lines of a panel, in natural logarithms of the size.


@figure("linearized_prediction")
def draw(result: Result) -> Figure:
    """Networks trained by each method, and regression under their kernels, by training-set size. Above: score, with
    null models. Middle: agreement of network and kernel, beside that of independent errors and of a network trained
    again. Below: correlation of their logits. Bars are 95 % Student intervals over seeds, within the possible values.
    """
    methods = [row["method"] for row in result.tables["methods"]]
    sizes = [row["size"] for row in result.tables["sizes"]]
    page = Figure(figsize=(PAGE_WIDTH, 3 * _ROW_HEIGHT + 0.7), layout="constrained")
    grid = page.subplots(3, len(methods), squeeze=False, sharex=True, sharey="row")
    metric = result.dataset["metric"]
    titles = (f"{metric}, held-out rows", "agreement with\nthe trained network", "correlation with\nits logits")
    lowest = (0.0 if metric == "accuracy" else -1.0, 0.0, -1.0)
    for place, (method, column) in enumerate(zip(methods, grid.T)):
        lines = _Lines(result, sizes, color_of_line(place), lowest)
        score, agreement, correlation = column
        lines.draw(score, "score", f"trained: {method}", "", "trained network", -1, marker="o")
        lines.draw(score, "score", f"kernel: {method}", "", REGRESSION, 1, linestyle="--", marker="D")
        for name, marker in _NULLS.items():
            lines.draw(score, "score", name, "", name.removeprefix("null: "), 0, bars=False, color="0.5", linestyle=":",
                       marker=marker)  # fmt: skip
        lines.draw(agreement, "prediction_agreement", method, REGRESSION, REGRESSION, 1, linestyle="--", marker="D")
        lines.draw(agreement, "independent_errors_agreement", method, REGRESSION, "independent errors", 0, bars=False,
                   linestyle=":", linewidth=0.9, marker="_", markersize=6)  # fmt: skip
        lines.draw(correlation, "logit_correlation", method, REGRESSION, REGRESSION, 1, linestyle="--", marker="D")
        lines.draw(
            correlation, "logit_correlation", method, SIGN, "sign-gradient kernel", -1, linestyle="-.", marker="^"
        )
        for panel, name in ((agreement, "trained_agreement"), (correlation, "trained_logit_correlation")):
            lines.draw(panel, name, method, AGAIN, "network trained again", 0, color="black", linewidth=0.9, marker="*")
        score.set_title(short(method))
        correlation.set_xlabel("training rows")
    for row, title, low in zip(grid, titles, lowest):
        row[0].set_ylabel(title)
        bottom, top = row[0].get_ylim()
        row[0].set_ylim(max(bottom, low - _MARGIN), min(top, 1 + _MARGIN))
        for panel in row:
            panel.set_xscale("log")
            panel.set_xticks(sizes, [str(size) for size in sizes])
            panel.minorticks_off()
            if len(sizes) == 1:
                panel.set_xlim(sizes[0] / 1.5, sizes[0] * 1.5)
            panel.grid(color="0.9", linewidth=0.5)
    handles = {str(line.get_label()): line for panel in grid[:, 0] for line in panel.containers}
    page.legend(
        handles=[*handles.values(), bar_handle("95 % interval over seeds")], loc="outside lower center", ncols=4
    )
    return page


class _Lines:
    """Draws metrics of a result against the size of the training set, in the colour of a method."""

    def __init__(self, result: Result, sizes: list[int], color: str, lowest: tuple[float, float, float]):
        self._result, self._sizes, self._color = result, sizes, color
        self._lowest: dict[str, float] = dict(zip(("score", "agreement", "correlation"), lowest))

    def draw(
        self, axes: Axes, name: str, left: str, right: str, label: str, shift: int, *, bars: bool = True, **look: object
    ) -> None:
        """Draw one line with error bars through the sizes at which the result holds the metric with a finite value."""
        points = [(size, self._result.find(name, stage=f"n={size}", left=left, right=right)) for size in self._sizes]
        kept = [(size, m) for size, m in points if m is not None and math.isfinite(m.value)]
        if not kept:
            return
        x = np.array([size for size, _ in kept]) * math.exp(_SHIFT * shift)
        y = np.array([m.value for _, m in kept])
        lowest = self._lowest[name.rpartition("_")[2]]
        ends = np.array([_ends(m, lowest) for _, m in kept]).T if bars else None
        options = {"color": self._color, "markersize": 3, "linewidth": 1.2, "elinewidth": 0.6, "label": label} | look
        axes.errorbar(x, y, yerr=ends, **options)  # pyright: ignore[reportArgumentType]


def _ends(metric: Metric, lowest: float) -> tuple[float, float]:
    """Distances of the ends of an interval from its value, of the part between the lowest possible value and 1.

    Student's intervals of two or three seeds can exceed the values that a quantity can have.
    """
    if metric.low is None or metric.high is None or not math.isfinite(metric.high - metric.low):
        return 0.0, 0.0
    return max(0.0, metric.value - max(metric.low, lowest)), max(0.0, min(metric.high, 1.0) - metric.value)


write = draw.write

if __name__ == "__main__":
    draw.command(__doc__)
