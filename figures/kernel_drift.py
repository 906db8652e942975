"""Drift along training: the change of kernels, Jacobians and outputs since initialisation, by method.

Drifts are relative to the value at initialisation; the error of the linearised network is relative to the change of
the outputs. The block of the Jacobian is that of the first run, divided by the root mean square of its entries before
training, so that equal colours mean equal sizes. Axes of drifts and the colours are logarithmic.
"""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage

from analyses.records import Result
from figures.figure import figure
from figures.methods import color_of_line, short
from figures.style import PAGE_WIDTH, SEQUENTIAL

_MARKERS = "os^Dv"
_LOGARITHMIC = ("relative_kernel_drift", "relative_jacobian_drift")
# Limits of the logarithmic colours, and their ticks, relative to the value at initialisation.
_TICKS = (0.1, 1, 10, 100)


@figure("kernel_drift")
def draw(result: Result) -> Figure:
    """Above: drift of kernel, Jacobian and linearised network over the steps, CKA with the start and with full
    fine-tuning, score; means over seeds, bands from the lowest run to the highest. Below: relative movement of the
    Jacobian by place and example after training, and entries of a block of it before training and how far they moved.
    No interval is drawn there.
    """
    methods = [row["method"] for row in result.tables["methods"]]
    page = Figure(figsize=(PAGE_WIDTH, 7.2), layout="constrained")
    lines, places, blocks = page.subfigures(3, 1, height_ratios=(3.3, 1.85, 2.0))
    _lines(lines, result, methods)
    _places(places, result, methods)
    _blocks(blocks, result, methods)
    return page


def _lines(panel: SubFigure, result: Result, methods: list[str]) -> None:
    axes = panel.subplots(2, 3)
    panels = [
        ("relative_kernel_drift", "$|K_t - K_0|\\,/\\,|K_0|$", "kernel drift"),
        ("relative_jacobian_drift", "$|J_t - J_0|\\,/\\,|J_0|$", "Jacobian drift"),
        ("linearisation_error", "$|f_t - f_t^{lin}|\\,/\\,|f_t - f_0|$", "linearisation error"),
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
        elif name != "score":
            ax.set_ylim(0, max(1.03, ax.get_ylim()[1]))
        ax.grid(color="0.9", linewidth=0.5)
        ax.set_axisbelow(True)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    panel.legend(handles, labels, loc="outside upper center", ncols=len(methods))


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


def _places(panel: SubFigure, result: Result, methods: list[str]) -> None:
    axes = panel.subplots(1, len(methods), squeeze=False)[0]
    panel.suptitle("$|J_t - J_0|\\,/\\,|J_0|$ after training, by place in the network and held-out example", x=0.01,
                   ha="left")  # fmt: skip
    images = []
    for ax, row in zip(axes, result.tables["methods"]):
        values = result.arrays[f"jacobian_drift.{row['method']}"]
        images.append(_map(ax, values))
        ax.set_yticks(range(len(row["places"])), row["places"])
        ax.set_xticks([])
        ax.set_xlabel(f"{values.shape[1]} examples")
        ax.set_title(short(row["method"]))
    _bar(panel, images[0], axes, "1: as large as $J_0$")


def _blocks(panel: SubFigure, result: Result, methods: list[str]) -> None:
    axes = panel.subplots(2, len(methods), squeeze=False)
    panel.suptitle(
        "entries of one small block of the Jacobian (examples down, parameters across): before training, and moved by",
        x=0.01, ha="left",
    )  # fmt: skip
    images = []
    for column, row in zip(axes.T, result.tables["methods"]):
        start, now = (result.arrays[f"{name}.{row['method']}"] for name in ("block_start", "block_now"))
        unit = float(np.sqrt(np.mean(start**2))) or 1.0
        for ax, values, label in zip(column, (start, now - start), ("$|J_0|$", "$|J_t - J_0|$")):
            images.append(_map(ax, np.abs(values) / unit))
            ax.set_xticks([])
            ax.set_yticks([])
            ax.set_ylabel(label)
        column[0].set_title(short(row["method"]))
        column[1].set_xlabel(_block_name(row["block"]))
    _bar(panel, images[0], axes, "1: root mean\nsquare of $J_0$")


def _map(ax: Axes, values: np.ndarray) -> AxesImage:
    norm = LogNorm(_TICKS[0], _TICKS[-1])
    # Zero has no logarithm; it gets the colour of the smallest value.
    return ax.imshow(np.maximum(values, 1e-30), cmap=SEQUENTIAL, norm=norm, aspect="auto", interpolation="nearest")


def _bar(panel: SubFigure, image: AxesImage, axes: np.ndarray, label: str) -> None:
    bar = panel.colorbar(image, ax=list(axes.flat), extend="both", fraction=0.03, pad=0.01)
    bar.set_ticks(list(_TICKS), labels=[f"{tick:g}" for tick in _TICKS])
    bar.ax.minorticks_off()
    bar.set_label(label)


def _block_name(text: str) -> str:
    """Short name of the block's parameter, which fits a third of a page; the table of methods has the full name."""
    parameter = text.removeprefix("gradient of the last output by ").partition(", ")[0]
    dull = ("base_model", "model", "default", "attention", "encoder", "weight")
    parts = [part for part in parameter.split(".") if part not in dull]
    return ".".join(parts[-6:])


write = draw.write

if __name__ == "__main__":
    draw.command(__doc__)
