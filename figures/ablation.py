"""Ablation of one choice in Propulsion: the score of every seed and the mean score, for each value of the choice."""

from matplotlib.figure import Figure

from analyses.records import Result
from figures.figure import figure
from figures.methods import draw_one_answer
from figures.style import COLUMN_WIDTH, PALETTE, mark_handle


@figure("ablation")
def draw(result: Result) -> Figure:
    """Score by setting: a dot a seed, a bar their mean, dashes the best single answer. No interval is drawn."""
    rows = result.tables["settings"]
    page = Figure(figsize=(COLUMN_WIDTH, 0.22 * len(rows) + 0.95), layout="constrained")
    ax = page.subplots()
    for place, row in enumerate(rows):
        scores = [score for score in row["scores"] if score is not None]
        ax.plot(scores, [place] * len(scores), "o", color=PALETTE[0], markersize=3, alpha=0.5)
        if scores:
            ax.plot([sum(scores) / len(scores)], [place], "|", color=PALETTE[1], markersize=10, markeredgewidth=1.5)
    draw_one_answer(ax, result.dataset, vertical=True)
    handles = [mark_handle("a seed", color=PALETTE[0], alpha=0.5),
               mark_handle("mean", "|", color=PALETTE[1], markersize=10, markeredgewidth=1.5)]  # fmt: skip
    page.legend(handles=[*handles, *ax.get_legend_handles_labels()[0]], loc="outside lower center", ncols=3)
    ax.set_yticks(range(len(rows)), [row["setting"] for row in rows])
    ax.invert_yaxis()
    words = f"{result.dataset['name']}, {result.dataset['metric']}"
    ax.set(xlabel=words, ylabel=result.config["factor"].replace("_", " "))
    ax.grid(axis="x", linewidth=0.3, alpha=0.6)
    return page


write = draw.write

if __name__ == "__main__":
    draw.command(__doc__)
