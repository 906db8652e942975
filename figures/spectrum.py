"""Spectra of methods' kernels: decay of eigenvalues, effective dimension, alignment with labels, speed of learning.

Lines are means over seeds; bands reach from the lowest to the highest seed. The grey band of the third panel holds
95 % of permuted labels, over the kernels of all methods; the line at zero is their mean, which is subtracted so that
what a task's labels have beyond chance can be seen. The dashed line is the kernel of the head alone.
"""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analyses.records import Result
from figures.figure import figure
from figures.methods import color_of_line, short
from figures.style import PAGE_WIDTH, band_handle

_HEIGHT = 4.4
_FLOOR = 1e-7  # Eigenvalues below this share of the trace are rounding errors of float32 kernels.
_HEAD = "head"
_BEYOND = 0.3


@figure("spectrum")
def draw(result: Result) -> Figure:
    """Decay of eigenvalues, effective dimension, share of the labels in the leading eigenvectors beyond that of
    permuted labels, and speed of learning, by method; means over seeds, bands from the lowest seed to the highest. The
    grey band holds 95 % of permuted labels; dashed is the head's kernel alone.
    """
    methods = [row["method"] for row in result.tables["methods"]]
    page = Figure(figsize=(PAGE_WIDTH, _HEIGHT), layout="constrained")
    axes = page.subplots(2, 2).ravel()
    number = result.arrays[f"eigenvalues.{methods[0]}"].shape[1]
    count = np.arange(1, number + 1)
    panels = (
        ("eigenvalues", count, "eigenvalue, by size", "share of the trace"),
        ("effective_dimension", result.arrays["ridges"], "ridge / mean eigenvalue", "effective dimension"),
        ("alignment", count, "leading eigenvectors", "label energy beyond permuted labels"),
        ("learnt", result.arrays["times"], "time × mean eigenvalue", "share of the labels learnt"),
    )
    for panel, (curve, x, label, title) in zip(axes, panels, strict=True):
        _lines(panel, result, methods, curve, x)
        panel.set(xscale="log", xlabel=label, ylabel=title, xlim=(x[0], x[-1]))
        panel.grid(color="0.9", linewidth=0.5)
    smallest = min(result.arrays[f"eigenvalues.{method}"].min() for method in methods)
    axes[0].set(yscale="log", ylim=(max(_FLOOR, smallest / 2), 1))
    axes[1].set(yscale="log", ylim=(0.8, 1.1 * number))
    mean, low, high = np.stack([result.arrays[f"null_alignment.{method}"] for method in methods]).transpose(1, 0, 2)
    axes[2].fill_between(count, (low - mean).min(axis=0), (high - mean).max(axis=0), color="0.85", lw=0, zorder=0,
                         label="permuted labels, 95 %")  # fmt: skip
    axes[2].axhline(0, color="0.5", linewidth=0.6)
    bottom, top = axes[2].get_ylim()
    # At least these limits, so that figures of several tasks can be compared.
    axes[2].set_ylim(min(bottom, -_BEYOND), max(top, _BEYOND))
    axes[3].set_ylim(0, 1.02)
    page.legend(handles=[*axes[2].get_legend_handles_labels()[0], band_handle()], loc="outside lower center", ncols=5)
    return page


def _lines(axes: Axes, result: Result, methods: list[str], curve: str, x: np.ndarray) -> None:
    for place, method in enumerate(methods):
        values = result.arrays[f"{curve}.{method}"]
        if curve == "alignment":
            values = values - result.arrays[f"null_alignment.{method}"][0]
        head = method == _HEAD
        color = "0.35" if head else color_of_line(place)
        label = "head alone" if head else short(method)
        axes.plot(x, values.mean(axis=0), color=color, linestyle="--" if head else "-", label=label)
        axes.fill_between(x, values.min(axis=0), values.max(axis=0), color=color, alpha=0.15, lw=0)


write = draw.write

if __name__ == "__main__":
    draw.command(__doc__)
