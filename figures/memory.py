"""Peak memory and time of a training step, with one bar for each method."""

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from analyses.records import Result
from figures.figure import figure
from figures.methods import short
from figures.style import PAGE_WIDTH, PALETTE, mark_handle


@figure("memory")
def draw(result: Result) -> Figure:
    """Peak memory and time of a step: bars are medians over rounds, dots the rounds."""
    rows, runs = result.tables["methods"], result.tables["runs"]
    panels = {"peak_bytes": ("peak memory, MB", 2**20), "seconds_per_step": ("seconds a step", 1)}
    page = Figure(figsize=(PAGE_WIDTH, 0.24 * len(rows) + 0.8), layout="constrained")
    axes = page.subplots(1, 2, sharey=True)
    for ax, (name, (words, unit)) in zip(axes, panels.items()):
        ax.barh(range(len(rows)), [row[name] / unit for row in rows], height=0.6, color=PALETTE[5])
        for place, row in enumerate(rows):
            each = [run[name] / unit for run in runs if run["method"] == row["method"]]
            ax.plot(each, [place] * len(each), "o", color=PALETTE[6], markersize=2)
        ax.set_xlabel(words)
    axes[0].set_yticks(range(len(rows)), [short(row["method"]) for row in rows])
    axes[0].invert_yaxis()
    handles = [Patch(color=PALETTE[5], label="median"), mark_handle("a round", color=PALETTE[6], markersize=2)]
    page.legend(handles=handles, loc="outside lower center", ncols=2)
    return page


write = draw.write

if __name__ == "__main__":
    draw.command(__doc__)
