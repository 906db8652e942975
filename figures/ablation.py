"""One choice in Propulsion varied: score of every seed and their mean, by value."""

from pathlib import Path

from matplotlib.figure import Figure

from analyses.records import Result
from figures.command import command
from figures.style import COLUMN_WIDTH, PALETTE, save, style


def draw(result: Result) -> Figure:
    """Draw the scores; a run that diverged has none."""
    rows = result.tables["settings"]
    with style():
        figure = Figure(figsize=(COLUMN_WIDTH, 0.22 * len(rows) + 0.7), layout="constrained")
        ax = figure.subplots()
        for place, row in enumerate(rows):
            scores = [score for score in row["scores"] if score is not None]
            ax.plot(scores, [place] * len(scores), "o", color=PALETTE[0], markersize=3, alpha=0.5)
            if scores:
                ax.plot([sum(scores) / len(scores)], [place], "|", color=PALETTE[1], markersize=10, markeredgewidth=1.5)
        ax.set_yticks(range(len(rows)), [row["setting"] for row in rows])
        ax.invert_yaxis()
        ax.set_xlabel(f"{result.dataset['name']}, {result.dataset['metric']}")
        ax.set_ylabel(result.config["factor"].replace("_", " "))
        ax.grid(axis="x", linewidth=0.3, alpha=0.6)
        figure.draw_without_rendering()
    return figure


def write(result: Result, folder: Path | str) -> list[Path]:
    """Draw and write `ablation.png` and `.pdf`.

    Raises:
        UserError: The folder cannot be written.
    """
    return save(draw(result), folder, "ablation")


if __name__ == "__main__":
    command("ablation", write, __doc__)
