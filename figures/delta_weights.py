"""Changes of the weights by each method: size and effective rank for every matrix; and the trained scales z."""

import numpy as np
from matplotlib.figure import Figure

from analyses.records import Result
from figures.figure import figure
from figures.methods import color_of_line, short
from figures.style import PAGE_WIDTH


@figure("delta_weights")
def draw(result: Result) -> Figure:
    """Left: size and effective rank of every matrix' change, a mark a matrix. Right: histogram of the trained scales.
    No interval is drawn.
    """
    layers = result.tables["layers"]
    methods = list(dict.fromkeys(row["method"] for row in layers))
    page = Figure(figsize=(PAGE_WIDTH, 2.6), layout="constrained")
    left, right = page.subplots(1, 2)
    for place, method in enumerate(methods):
        rows = [row for row in layers if row["method"] == method]
        color, marker = color_of_line(place), "osD^vP*X"[place % 8]
        left.plot([row["relative_size"] for row in rows], [row["effective_rank_share"] for row in rows], marker,
                  color=color, markersize=3, alpha=0.7, label=short(method))  # fmt: skip
    left.set(xscale="log", yscale="log", xlabel=r"$\|\Delta W\| / \|W\|$", ylabel="effective rank / full rank")
    left.grid(linewidth=0.3, alpha=0.6)
    for name, values in result.arrays.items():
        if name.startswith("z."):
            method = name.removeprefix("z.")
            color = color_of_line(methods.index(method))
            right.hist(values, bins=np.linspace(values.min(), values.max(), 60), histtype="step", color=color,
                       density=True, label=short(method))  # fmt: skip
    right.set(yscale="log", xlabel="z after training", ylabel="density")
    page.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return page


write = draw.write

if __name__ == "__main__":
    draw.command(__doc__)
