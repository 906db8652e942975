"""How far the Jacobian has moved after training: by place in the network and example, and entry by entry of a block.

One row is one method. The block is that of the first run, divided by the root mean square of its entries before
training, so that equal colours mean equal sizes. Colours are logarithmic.
"""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from analyses.records import Result
from figures.figure import figure
from figures.methods import short
from figures.style import PAGE_WIDTH, SEQUENTIAL

# Limits of the logarithmic colours, and their ticks, relative to the value at initialisation.
_TICKS = (0.1, 1, 10, 100)
_PLACE = 0.155
"""Inches of a place in the network."""


@figure("kernel_drift_jacobian")
def draw(result: Result) -> Figure:
    """Row by row one method. Left: movement of the Jacobian after training, by place in the network and example, over
    its size at initialisation. Middle and right: entries of a small block of it before training, and how far they
    moved. No interval is drawn.
    """
    rows = result.tables["methods"]
    places = [len(row["places"]) for row in rows]
    page = Figure(figsize=(PAGE_WIDTH, sum(max(6, n) * _PLACE + 0.3 for n in places) + 0.5), layout="constrained")
    grid = page.subplots(len(rows), 3, squeeze=False, width_ratios=(3, 4, 4), height_ratios=[max(6, n) for n in places])
    images: list[AxesImage] = []
    for axes, row in zip(grid, rows):
        drift, start, now = (result.arrays[f"{name}.{row['method']}"] for name in
                             ("jacobian_drift", "block_start", "block_now"))  # fmt: skip
        unit = float(np.sqrt(np.mean(start**2))) or 1.0
        images = [_map(ax, np.abs(values)) for ax, values in zip(axes, (drift, start / unit, (now - start) / unit))]
        for ax in axes:
            ax.set(xticks=[], yticks=[])
        axes[0].set_yticks(range(len(row["places"])), row["places"])
        axes[0].set_ylabel(short(row["method"]), fontweight="bold")
        axes[1].set(xlabel=_block_name(row["block"]), ylabel="examples")
        axes[2].set_xlabel("the same entries")
        axes[0].set_xlabel(f"{drift.shape[1]} held-out examples")
    titles = (r"$\|J_t - J_0\|\,/\,\|J_0\|$ by place", "entries $|J_0|$", "their change $|J_t - J_0|$")
    for ax, title in zip(grid[0], titles):
        ax.set_title(title)
    look = {"extend": "both", "location": "bottom", "aspect": 50, "fraction": 0.04, "pad": 0.02}
    bar = page.colorbar(images[0], ax=list(grid.flat), **look)
    bar.set_ticks(list(_TICKS), labels=[f"{tick:g}" for tick in _TICKS])
    bar.ax.minorticks_off()
    bar.set_label("1: as large as $J_0$ (left), as the root mean square of the entries of $J_0$ (middle and right)")
    return page


def _map(ax: Axes, values: np.ndarray) -> AxesImage:
    norm = LogNorm(_TICKS[0], _TICKS[-1])
    # Zero has no logarithm; it gets the colour of the smallest value.
    return ax.imshow(np.maximum(values, 1e-30), cmap=SEQUENTIAL, norm=norm, aspect="auto", interpolation="nearest")


def _block_name(text: str) -> str:
    """Short name of the block's parameter, which fits a third of a page; the table of methods has the full name."""
    parameter = text.removeprefix("gradient of the last output by ").partition(", ")[0]
    dull = ("base_model", "model", "default", "attention", "encoder", "weight")
    parts = [part for part in parameter.split(".") if part not in dull]
    return ".".join(parts[-6:])
