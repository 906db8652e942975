"""A language model tuned by instruction: accuracy of every method with its interval, beside the share that answers."""

from pathlib import Path

from matplotlib.figure import Figure

from analyses.records import Result
from figures.command import command
from figures.method_comparison import short
from figures.style import PAGE_WIDTH, PALETTE, save, style

UNTUNED = "none"
_ROW_HEIGHT = 0.22
_LINES = {"commonest answer": "--", "chance": ":"}


def draw(result: Result) -> Figure:
    """Draw one row a method, the untuned model in grey, and the baselines as lines across the accuracies."""
    rows = result.tables["methods"]
    names = ["untuned" if row["method"] == UNTUNED else short(row["method"]) for row in rows]
    with style():
        figure = Figure(figsize=(PAGE_WIDTH, _ROW_HEIGHT * len(rows) + 0.9), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
        for place, row in enumerate(rows):
            color = _color(row["method"])
            found = result.metric("accuracy", stage="trained", left=row["method"])
            left.plot([found.low, found.high], [place, place], color=color)
            left.plot([found.value], [place], "o", markersize=3.5, color=color)
            right.barh(place, row["answered"], height=0.5, color=color)
        for row in result.tables["baselines"]:
            if row["accuracy"] is not None:
                label = row["baseline"] + (f" ({row['answer']})" if row["answer"] else "")
                left.axvline(row["accuracy"], color=PALETTE[2], linewidth=0.9, linestyle=_LINES[row["baseline"]],
                             label=label, zorder=0)  # fmt: skip
        left.set_yticks(range(len(rows)), names)
        left.set_ylim(len(rows) - 0.5, -0.5)
        left.set_xlabel(f"accuracy, {result.dataset['name']}")
        right.set_xlabel("share of rows with an answer")
        right.set_xlim(0, 1)
        for ax in (left, right):
            ax.grid(axis="x", linewidth=0.3, alpha=0.6)
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=2)
        figure.draw_without_rendering()
    return figure


def _color(method: str) -> str:
    if method == UNTUNED:
        return "0.45"
    return PALETTE[1] if method.startswith("propulsion") else PALETTE[0]


def write(result: Result, folder: Path | str) -> list[Path]:
    """Draw and write `instruction_tuning.png` and `.pdf`.

    Raises:
        UserError: The folder cannot be written.
    """
    return save(draw(result), folder, "instruction_tuning")


if __name__ == "__main__":
    command("instruction_tuning", write, __doc__)
