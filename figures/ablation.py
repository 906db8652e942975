"""One choice in Propulsion varied: score of every seed and their mean, by value."""

from dataclasses import dataclass
from pathlib import Path

import tyro
from matplotlib.figure import Figure

from analyses.results import Result, load_result
from figures.style import COLUMN_WIDTH, PALETTE, save, style
from propulsion.errors import run_command


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


@dataclass(frozen=True)
class Config:
    """Draw the figure of a result of analyses.ablation again."""

    result: tyro.conf.Positional[Path]
    """Result folder."""


def main(config: Config) -> None:
    """Read, draw, write."""
    for path in write(load_result(config.result, analysis="ablation"), config.result):
        print(path)


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Config, prog="python -m figures.ablation", description=__doc__)))
