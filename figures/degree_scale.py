"""The degree at which both kernels have the same trace, by width, depth and model."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analyses.records import Result
from figures.figure import figure
from figures.style import PAGE_WIDTH, PALETTE, bar_handle, mark_handle

PAPER_BEST = (25, 75)
_EXPECTED: dict[str, Any] = {"color": "black", "linewidth": 0.9, "zorder": 1.5, "label": "expected"}


@figure("degree_scale", settled=False)
def draw(result: Result) -> Figure:
    """The degree k* at which both kernels have one size. Bars are 95 % bootstrap intervals, over networks drawn or over
    examples; the grey band is where the paper's ablation peaks.
    """
    rows = result.tables["ratios"]
    page = Figure(figsize=(PAGE_WIDTH, 2.9), layout="constrained")
    left, middle, right = page.subplots(1, 3, sharey=True, width_ratios=(5, 5, 6))
    _random_networks(left, [r for r in rows if r["kind"] == "random network"])
    _architectures(middle, [r for r in rows if r["kind"] == "random architecture"])
    _pretrained(right, [r for r in rows if r["kind"] == "pre-trained"])
    left.set_ylabel(r"$k^* = (\mathrm{tr}\, K_F\,/\,\mathrm{tr}\, K_P(1))^{1/2}$")
    marks = [mark_handle("$k^*$"), bar_handle("its 95 % interval"), Line2D([], [], **_EXPECTED)]
    handles = [*marks, *right.get_legend_handles_labels()[0]]
    for axes in (left, middle, right):
        band = axes.axhspan(*PAPER_BEST, color="0.92", zorder=0, label="best degrees in the paper's ablation")
        axes.set_yscale("log")
        axes.set_yticks([5, 10, 20, 50, 100], ["5", "10", "20", "50", "100"])
        axes.minorticks_off()
    page.legend(handles=[*handles, band], loc="outside lower center", ncols=5, columnspacing=1.2, handletextpad=0.4)
    return page


def _random_networks(axes: Axes, rows: list[dict[str, Any]]) -> None:
    for depth, color, line in _by_width(axes, rows, "depth"):
        if len(line) > 1:
            axes.plot([r["width"] for r in line], [r["expected"] for r in line], **_EXPECTED)
        _errorbar(axes, [r["width"] for r in line], line, color=color, label=f"depth {depth}")
    axes.set_title("ReLU networks\nexpected: infinite width")
    axes.legend(handles=axes.containers, loc="upper left", ncols=2, handletextpad=0.1, columnspacing=0.8)


def _architectures(axes: Axes, rows: list[dict[str, Any]]) -> None:
    for name, color, line in _by_width(axes, rows, "model"):
        _errorbar(axes, [r["width"] for r in line], line, color=color, label=name)
    if rows:
        # Above the band, in which the line lies.
        axes.axhline(rows[0]["expected"], **_EXPECTED)
    axes.set_title("Random weights\nexpected: 1 / standard deviation")
    axes.legend(handles=axes.containers, loc="lower center", ncols=2, handletextpad=0.1, columnspacing=1)


def _pretrained(axes: Axes, rows: list[dict[str, Any]]) -> None:
    places = np.arange(len(rows))
    _errorbar(axes, places, rows, color=PALETTE[1])
    axes.hlines([r["expected"] for r in rows], places - 0.25, places + 0.25, color=_EXPECTED["color"], linewidth=1)
    degrees = [(i, r["paper_degree"]) for i, r in enumerate(rows) if r["paper_degree"]]
    if degrees:
        axes.plot(*zip(*degrees), "x", color=PALETTE[0], markersize=4, label="paper's degree")
    names = [row["model"].split(", ") for row in rows]
    axes.set_xticks(places, [task for _, task in names], rotation=90 if len(rows) > 5 else 0)
    axes.set(xlim=(-0.6, len(rows) - 0.4), title="Pre-trained models\nexpected: 1 / rms of the weights")
    for model in dict.fromkeys(model for model, _ in names):
        own = [i for i, (other, _) in enumerate(names) if other == model]
        words = model.replace("-", "-\n", 1)  # names of four models would overlap on one line
        axes.annotate(
            words, (np.mean(own), 0.97), xycoords=("data", "axes fraction"), ha="center", va="top", fontsize=8
        )
        if own[0]:
            axes.axvline(own[0] - 0.5, color="0.6", linewidth=0.6)


def _errorbar(axes: Axes, x: Any, rows: list[dict[str, Any]], *, color: str, label: str = "_") -> None:
    y = np.array([r["matching_degree"] for r in rows])
    ends = np.clip([y - [r["low"] for r in rows], [r["high"] for r in rows] - y], 0, None)
    axes.errorbar(x, y, ends, fmt="o", markersize=3, linewidth=0.8, color=color, label=label)


def _by_width(axes: Axes, rows: list[dict[str, Any]], key: str) -> list[tuple[Any, str, list[dict[str, Any]]]]:
    """Set up a horizontal axis of widths; return each value of a column with its colour and its rows, by width."""
    widths = sorted({r["width"] for r in rows})
    axes.set(xscale="log", xlabel="width")
    axes.set_xticks(widths, [str(w) for w in widths])
    ordered = sorted(rows, key=lambda r: r["width"])
    values = sorted({r[key] for r in rows})
    return [(value, color, [r for r in ordered if r[key] == value]) for value, color in zip(values, PALETTE)]


write = draw.write

if __name__ == "__main__":
    draw.command(__doc__)
