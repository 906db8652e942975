"""Finite networks and their limits: error, gap between the kernels, and ratio of their traces, by width."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analyses.records import Result
from figures.figure import figure
from figures.style import PAGE_WIDTH, PALETTE

MARKERS = "osD^v<>"
SHOWN = ("linear", "relu", "erf", "gelu")
"""Activations drawn in the middle panel; more lines would be hard to tell apart."""


@figure("width_convergence", settled=False)
def draw(result: Result) -> Figure:
    """Error of Propulsion's kernel, gap between the kernels with the scatter of single networks (dashed) and the limit
    (dotted), and ratio of traces, by width. Root mean squares over networks; no interval is drawn.
    """
    rows, activations = result.tables["widths"], result.config["activations"]
    widths = np.array(result.config["widths"])

    def column(name: str, activation: str, parametrization: str = "ntk") -> np.ndarray:
        chosen = [r for r in rows if (r["activation"], r["parametrization"]) == (activation, parametrization)]
        return np.array([r[name] for r in sorted(chosen, key=lambda r: r["width"])])

    page = Figure(figsize=(PAGE_WIDTH, 2.7), layout="constrained")
    left, middle, right = page.subplots(1, 3)
    for activation, color, marker in zip(activations, PALETTE, MARKERS):
        look = {"color": color, "marker": marker, "markersize": 3, "linewidth": 1}
        left.plot(widths, column("error_propulsion", activation), label=activation.replace("_", " "), **look)
        if activation in SHOWN:
            middle.plot(widths, column("gap", activation), **look)
            middle.plot(widths, column("gap_scatter", activation), **look, linestyle="--")
            middle.axhline(column("gap_of_the_limits", activation)[0], color=color, linewidth=0.6, linestyle=":")
        right.plot(widths, column("trace_ratio", activation), **look)
        right.plot(widths, column("trace_ratio", activation, "standard"), **look, linestyle="--")
    reference = max(column("error_propulsion", a)[0] for a in activations) * 1.3
    end = reference * np.sqrt(widths[0] / widths[-1])
    left.plot(widths[[0, -1]], [reference, end], color="0.6", linewidth=0.8, zorder=0)
    left.annotate("∝ width$^{-1/2}$", (0.97, 0.95), xycoords="axes fraction", color="0.4", ha="right", va="top")
    for axes in (left, middle, right):
        axes.set(xscale="log", yscale="log", xlabel="width")
        axes.set_xticks(widths, [str(w) for w in widths])
        axes.minorticks_off()
    for axes in (left, middle):
        low, high = axes.get_ylim()
        axes.set_yticks([0.02, 0.05, 0.1, 0.2, 0.5, 1], ["0.02", "0.05", "0.1", "0.2", "0.5", "1"])
        axes.set_ylim(max(0.01, low), high)
    left.set(ylabel="relative error", title="Propulsion's kernel and its limit")
    middle.set(ylabel="relative to $K_F$ of the hidden layers", title="Gap between the kernels")
    right.set(ylabel=r"tr $K_F$ / tr $K_P$", title="Sizes of the kernels")
    styles: Sequence[tuple[str, Any]] = (("mean (right: NTK parametrisation)", "-"),
              ("scatter of networks (right: standard parametrisation)", "--"), ("limit", ":"))  # fmt: skip
    grey = [Line2D([], [], color="0.4", linewidth=1, linestyle=dashes, label=words) for words, dashes in styles]
    handles = [*left.get_legend_handles_labels()[0], *grey]
    page.legend(handles=handles, loc="outside lower center", ncols=4, columnspacing=1.2)
    return page


write = draw.write

if __name__ == "__main__":
    draw.command(__doc__)
