"""Learning curves of methods: training loss and validation score by step, as means over seeds."""

import numpy as np
from matplotlib.figure import Figure

from analyses.records import Result
from figures.figure import figure
from figures.methods import color_of_line, draw_one_answer, short
from figures.style import PAGE_WIDTH, PALETTE, band_handle

_SMOOTHED = 10  # Steps of the moving mean of losses.


@figure("convergence")
def draw(result: Result) -> Figure:
    """Training loss (left) and validation score (right) by step, means over seeds; shades reach from the lowest seed to
    the highest.
    """
    methods = [row["method"] for row in result.tables["methods"]]
    steps = result.arrays["steps"]
    page = Figure(figsize=(PAGE_WIDTH, 2.7), layout="constrained")
    left, right = page.subplots(1, 2)
    for place, method in enumerate(methods):
        line = {"color": color_of_line(place), "label": short(method)}
        line["linestyle"] = "-" if place < len(PALETTE) else "--"
        losses = result.arrays[f"losses.{method}"].mean(axis=0)
        window = min(_SMOOTHED, len(losses))
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        left.plot(np.arange(window, len(losses) + 1), smooth, **line)
        scores = result.arrays[f"scores.{method}"]
        right.plot(steps, scores.mean(axis=0), **line)
        right.fill_between(steps, scores.min(axis=0), scores.max(axis=0), color=line["color"], alpha=0.12, lw=0)
    left.set(xlabel="optimizer step", ylabel=f"training loss, mean of {_SMOOTHED} steps")
    right.set(xlabel="optimizer step", ylabel=f"{result.dataset['metric']}, validation")
    draw_one_answer(right, result.dataset)
    handles = [*right.get_legend_handles_labels()[0], band_handle()]
    page.legend(handles=handles, loc="outside lower center", ncols=5)
    return page


write = draw.write

if __name__ == "__main__":
    draw.command(__doc__)
