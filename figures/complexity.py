"""Cost of a method on one layer over that of the frozen layer: by multiply-adds, and as measured."""

from pathlib import Path

from matplotlib.figure import Figure

from analyses.records import Result
from figures.command import command
from figures.style import COLUMN_WIDTH, PALETTE, save, style


def draw(result: Result) -> Figure:
    """Draw two dots a method."""
    rows = [row for row in result.tables["methods"] if row["method"] != "frozen"]
    with style():
        figure = Figure(figsize=(COLUMN_WIDTH, 0.22 * len(rows) + 0.9), layout="constrained")
        ax = figure.subplots()
        places = range(len(rows))
        ax.plot([row["operations_ratio"] for row in rows], places, "o", color=PALETTE[0], markersize=4,
                label="multiply-adds")  # fmt: skip
        ax.plot([row["time_ratio"] for row in rows], places, "D", color=PALETTE[1], markersize=4, label="time")
        ax.axvline(1, color="0.5", linewidth=0.6)
        ax.set_yticks(places, [row["method"] for row in rows])
        ax.invert_yaxis()
        ax.set_xlabel("over the frozen layer")
        ax.grid(axis="x", linewidth=0.3, alpha=0.6)
        figure.legend(loc="outside upper center", ncols=2)
        figure.draw_without_rendering()
    return figure


def write(result: Result, folder: Path | str) -> list[Path]:
    """Draw and write `complexity.png` and `.pdf`.

    Raises:
        UserError: The folder cannot be written.
    """
    return save(draw(result), folder, "complexity")


if __name__ == "__main__":
    command("complexity", write, __doc__)
