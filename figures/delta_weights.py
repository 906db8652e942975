"""What each method changes: size and effective rank of its change of every matrix, and where Propulsion's z went."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from analyses.records import Result
from figures.command import command
from figures.method_comparison import short
from figures.style import PAGE_WIDTH, PALETTE, save, style


def draw(result: Result) -> Figure:
    """Draw one dot a matrix, one colour a method, and a histogram of z."""
    layers = result.tables["layers"]
    methods = list(dict.fromkeys(row["method"] for row in layers))
    with style():
        figure = Figure(figsize=(PAGE_WIDTH, 2.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for place, method in enumerate(methods):
            rows = [row for row in layers if row["method"] == method]
            color, marker = PALETTE[place % len(PALETTE)], "osD^vP*X"[place % 8]
            left.plot([row["relative_size"] for row in rows], [row["effective_rank_share"] for row in rows], marker,
                      color=color, markersize=3, alpha=0.7, label=short(method))  # fmt: skip
        left.set_xscale("log")
        left.set_yscale("log")
        left.set_xlabel(r"$\|\Delta W\| / \|W\|$")
        left.set_ylabel("effective rank / full rank")
        left.grid(linewidth=0.3, alpha=0.6)
        for name, values in result.arrays.items():
            if name.startswith("z."):
                method = name.removeprefix("z.")
                color = PALETTE[methods.index(method) % len(PALETTE)]
                right.hist(values, bins=np.linspace(values.min(), values.max(), 60), histtype="step", color=color,
                           density=True, label=short(method))  # fmt: skip
        right.set_yscale("log")
        right.set_xlabel("z after training")
        right.set_ylabel("density")
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=4)
        figure.draw_without_rendering()
    return figure


def write(result: Result, folder: Path | str) -> list[Path]:
    """Draw and write `delta_weights.png` and `.pdf`.

    Raises:
        UserError: The folder cannot be written.
    """
    return save(draw(result), folder, "delta_weights")


if __name__ == "__main__":
    command("delta_weights", write, __doc__)
