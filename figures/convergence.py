"""Learning curves: loss and validation score by step, one line a method, mean over seeds."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from analyses.records import Result
from figures.command import command
from figures.method_comparison import short
from figures.style import PAGE_WIDTH, PALETTE, save, style

_SMOOTHED = 10  # Steps of the moving mean of losses.


def draw(result: Result) -> Figure:
    """Draw both panels; shades span the seeds' lowest and highest score."""
    methods = [row["method"] for row in result.tables["methods"]]
    steps = result.arrays["steps"]
    with style():
        figure = Figure(figsize=(PAGE_WIDTH, 2.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for place, method in enumerate(methods):
            line = {"color": PALETTE[place % len(PALETTE)], "label": short(method)}
            line["linestyle"] = "-" if place < len(PALETTE) else "--"
            losses = result.arrays[f"losses.{method}"].mean(axis=0)
            window = min(_SMOOTHED, len(losses))
            smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
            left.plot(np.arange(window, len(losses) + 1), smooth, **line)
            scores = result.arrays[f"scores.{method}"]
            right.plot(steps, scores.mean(axis=0), **line)
            right.fill_between(steps, scores.min(axis=0), scores.max(axis=0), color=line["color"], alpha=0.12, lw=0)
        left.set_xlabel("optimizer step")
        left.set_ylabel(f"training loss, mean of {_SMOOTHED} steps")
        right.set_xlabel("optimizer step")
        right.set_ylabel(f"{result.dataset['metric']}, validation")
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=4)
        figure.draw_without_rendering()
    return figure


def write(result: Result, folder: Path | str) -> list[Path]:
    """Draw and write `convergence.png` and `.pdf`.

    Raises:
        UserError: The folder cannot be written.
    """
    return save(draw(result), folder, "convergence")


if __name__ == "__main__":
    command("convergence", write, __doc__)
