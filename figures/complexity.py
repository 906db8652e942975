"""Cost of each method on one layer relative to the frozen layer: in multiply-adds, and in measured time."""

from matplotlib.figure import Figure

from analyses.records import Result
from figures.figure import figure
from figures.style import COLUMN_WIDTH, PALETTE


@figure("complexity")
def draw(result: Result) -> Figure:
    """Cost of a forward and backward pass of one layer over that of the frozen layer: multiply-adds by formula, and
    time as the median of the timed passes. No interval is drawn.
    """
    rows = [row for row in result.tables["methods"] if row["method"] != "frozen"]
    page = Figure(figsize=(COLUMN_WIDTH, 0.22 * len(rows) + 0.9), layout="constrained")
    ax = page.subplots()
    places = range(len(rows))
    ax.plot([row["operations_ratio"] for row in rows], places, "o", color=PALETTE[0], markersize=4,
            label="multiply-adds")  # fmt: skip
    ax.plot([row["time_ratio"] for row in rows], places, "D", color=PALETTE[1], markersize=4, label="time")
    ax.axvline(1, color="0.5", linewidth=0.6, label="frozen layer")
    ax.set_yticks(places, [row["method"] for row in rows])
    ax.invert_yaxis()
    ax.set_xlabel("over the frozen layer")
    ax.grid(axis="x", linewidth=0.3, alpha=0.6)
    page.legend(loc="outside lower center", ncols=3)
    return page


write = draw.write

if __name__ == "__main__":
    draw.command(__doc__)
