"""Drift over the steps of training: kernel, Jacobian, linearised network, alignments and score, by method.

Drifts are relative to the value at initialisation, on logarithmic axes; the error of the linearised network is relative
to the change of the outputs.
"""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analyses.records import Result
from figures.figure import figure
from figures.methods import color_of_line, draw_one_answer, short
from figures.style import PAGE_WIDTH, band_handle

_MARKERS = "os^Dv"
_LOGARITHMIC = ("relative_kernel_drift", "relative_jacobian_drift")


@figure("kernel_drift")
def draw(result: Result) -> Figure:
    """Drift of kernel, Jacobian and linearised network over the steps, CKA with the start and with full fine-tuning,
    score; means over seeds, bands from the lowest run to the highest. Dashed is the best single answer, dotted a change
    as large as the start.
    """
    methods = [row["method"] for row in result.tables["methods"]]
    page = Figure(figsize=(PAGE_WIDTH, 3.4), layout="constrained")
    axes = page.subplots(2, 3)
    panels = [
        ("relative_kernel_drift", r"$\|K_t - K_0\|\,/\,\|K_0\|$", "kernel drift"),
        ("relative_jacobian_drift", r"$\|J_t - J_0\|\,/\,\|J_0\|$", "Jacobian drift"),
        ("linearisation_error", r"$\|f_t - f_t^{\mathrm{lin}}\|\,/\,\|f_t - f_0\|$", "linearisation error"),
        ("kernel_cka_with_start", "CKA of $K_t$ and $K_0$", "same kernel as at the start?"),
        ("cka", f"CKA with {short(methods[0])}", f"same kernel as {short(methods[0])}?"),
        ("score", f"{result.dataset['metric']}, validation", "score"),
    ]
    # Rows that compare the first method with each of the other methods.
    pairs = [row | {"method": row["right"]} for row in result.tables["pairs"] if row["left"] == methods[0]]
    last = int(result.arrays["steps"][-1])
    for ax, (name, label, title) in zip(axes.flat, panels):
        for place, method in enumerate(methods):
            rows = pairs if name == "cka" else result.tables["checkpoints"]
            found = [row for row in rows if (row["method"], row["quantity"]) == (method, name)]
            if name in _LOGARITHMIC:
                found = [row for row in found if (row["value"] or 0) > 0]
            _line(ax, found, place, short(method))
        ax.set_title(title, loc="left")
        ax.set(xlabel="optimizer step", ylabel=label, xlim=(-0.03 * last, 1.03 * last))
        if "cka" in name:
            ax.set_ylim(min(0.0, ax.get_ylim()[0]), 1.03)
        elif name in _LOGARITHMIC:
            ax.set_yscale("log")
            ax.axhline(1, color="0.5", linewidth=0.8, linestyle=":")
        elif name == "score":
            draw_one_answer(ax, result.dataset)
        else:
            ax.set_ylim(0, max(1.03, ax.get_ylim()[1]))
        ax.grid(color="0.9", linewidth=0.5)
        ax.set_axisbelow(True)
    as_start = Line2D([], [], color="0.5", linewidth=0.8, linestyle=":", label="as large as at the start")
    handles = [*axes[-1, -1].get_legend_handles_labels()[0], band_handle(), as_start]
    page.legend(handles=handles, loc="outside lower center", ncols=6, columnspacing=1.2)
    return page


def _line(ax: Axes, rows: list[dict[str, Any]], place: int, label: str) -> None:
    rows = [row for row in rows if row["value"] is not None]
    if not rows:
        return
    color = color_of_line(place)
    steps = [row["step"] for row in rows]
    ax.plot(steps, [row["value"] for row in rows], marker=_MARKERS[place % len(_MARKERS)], markersize=3.5, color=color,
            label=label)  # fmt: skip
    runs = np.array([row["by_seed"] for row in rows], dtype=float)
    ax.fill_between(steps, runs.min(axis=1), runs.max(axis=1), color=color, alpha=0.15, linewidth=0)
