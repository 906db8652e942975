"""Instruction tuning of a language model: accuracy of every method with its interval, and share of rows answered."""

from matplotlib.figure import Figure

from analyses.records import Result
from figures.figure import figure
from figures.methods import color_of_method, short
from figures.style import PAGE_WIDTH, PALETTE, bar_handle, mark_handle

UNTUNED = "none"
_ROW_HEIGHT = 0.22
_LINES = {"commonest answer": "--", "chance": ":"}


@figure("instruction_tuning")
def draw(result: Result) -> Figure:
    """Left: accuracy by generation of every method, the untuned model in grey; bars are 95 % Wilson intervals over
    validation rows, lines the baselines. Right: share of rows that got an answer, without an interval.
    """
    rows = result.tables["methods"]
    names = ["untuned" if row["method"] == UNTUNED else short(row["method"]) for row in rows]
    page = Figure(figsize=(PAGE_WIDTH, _ROW_HEIGHT * len(rows) + 0.9), layout="constrained")
    left, right = page.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    for place, row in enumerate(rows):
        color = "0.45" if row["method"] == UNTUNED else color_of_method(row["method"])
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
    left.set(xlabel=f"accuracy, {result.dataset['name']}", ylim=(len(rows) - 0.5, -0.5))
    right.set(xlabel="share of rows with an answer", xlim=(0, 1))
    for ax in (left, right):
        ax.grid(axis="x", linewidth=0.3, alpha=0.6)
    marks = [mark_handle("accuracy"), bar_handle("95 % interval", horizontal=True)]
    handles = [*marks, *left.get_legend_handles_labels()[0]]
    page.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return page


write = draw.write

if __name__ == "__main__":
    draw.command(__doc__)
