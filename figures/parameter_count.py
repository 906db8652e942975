"""Trained parameters of Propulsion beside the whole model, one row a model, on a logarithmic axis."""

from pathlib import Path

from matplotlib.figure import Figure

from analyses.records import Result
from figures.command import command
from figures.style import PAGE_WIDTH, PALETTE, save, style

_SHOWN = {"attn": "query, key, value", "blocks": "block Linears", "everything": "every Linear and Embedding",
          "total": "whole model"}  # fmt: skip


def draw(result: Result) -> Figure:
    """Draw the counts of every model."""
    rows = result.tables["counts"]
    with style():
        figure = Figure(figsize=(PAGE_WIDTH, 0.26 * len(rows) + 0.8), layout="constrained")
        ax = figure.subplots()
        for place, (count, words) in enumerate(_SHOWN.items()):
            ax.plot([row[count] for row in rows], range(len(rows)), "osD^"[place], color=PALETTE[place], label=words,
                    markersize=4)  # fmt: skip
        ax.set_yticks(range(len(rows)), [row["model"] for row in rows])
        ax.invert_yaxis()
        ax.set_xscale("log")
        ax.set_xlabel("parameters")
        ax.grid(axis="x", linewidth=0.3, alpha=0.6)
        figure.legend(loc="outside upper center", ncols=len(_SHOWN))
        figure.draw_without_rendering()
    return figure


def write(result: Result, folder: Path | str) -> list[Path]:
    """Draw and write `parameter_count.png` and `.pdf`.

    Raises:
        UserError: The folder cannot be written.
    """
    return save(draw(result), folder, "parameter_count")


if __name__ == "__main__":
    command("parameter_count", write, __doc__)
