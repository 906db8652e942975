"""The choice of a method: predicted scores of the candidates, and how the choice went.

python -m figures.choose results/choose-demo
"""

from collections.abc import Sequence
from math import nan
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analyses.records import RecordError, Result
from figures.figure import figure
from figures.methods import color_of_method, draw_one_answer, short
from figures.style import PAGE_WIDTH, PALETTE, bar_handle, mark_handle

_ROW_HEIGHT = 0.19
_FIRST_TWO = (PALETTE[6], PALETTE[2])
"""Colours of the first two candidates on the right, other than those that tell Propulsion from other methods."""


@figure("choose")
def draw(result: Result) -> Figure:
    """Left: predicted score of each candidate, beside its trained parameters; bars are 95 % bootstrap intervals over
    the held-out rows, filled marks candidates that are within one standard error of the best in at least half of the
    resamples. Right, if there was more than one round: held-out scores round by round; lines are candidates that went
    on.

    Raises:
        RecordError: The result ranks no candidate.
    """
    ranking = result.tables["ranking"]
    if not ranking:
        raise RecordError("the result ranks no candidate")
    metric = result.dataset["metric"]
    page = Figure(figsize=(PAGE_WIDTH, _ROW_HEIGHT * max(len(ranking), 8) + 0.8), layout="constrained")
    rounds = result.tables["rounds"]
    lengths = sorted({row["steps"] for row in rounds})
    if len(lengths) > 1:
        left, right = page.subplots(1, 2, width_ratios=[3, 2])
        _draw_rounds(right, ranking, rounds)
        right.set_xticks(lengths, map(str, lengths))
        right.set_ylabel(f"{metric} on held-out rows")
    else:
        left = page.subplots()
    for place, row in enumerate(reversed(ranking)):
        color = color_of_method(row["candidate"])
        left.plot([row["low"], row["high"]], [place, place], color=color)
        fill = color if row["near_best"] >= 0.5 else "white"
        left.plot([row["score"]], [place], "o", markersize=3.5, color=color, markerfacecolor=fill)
    draw_one_answer(left, result.dataset, vertical=True)
    left.set_yticks(
        range(len(ranking)), [f"{short(row['candidate'])}  {row['trained_parameters']:,}" for row in reversed(ranking)]
    )
    left.set_xlabel(f"predicted {metric} on held-out rows")
    left.grid(axis="x", linewidth=0.3, alpha=0.6)
    marks = [mark_handle("within 1 SE of the best"), mark_handle("further below", markerfacecolor="white"),
             bar_handle("95 % interval", horizontal=True)]  # fmt: skip
    page.legend(handles=[*marks, *left.get_legend_handles_labels()[0]], loc="outside lower center", ncols=4)
    return page


def _draw_rounds(axes: Axes, ranking: Sequence[dict[str, Any]], rounds: Sequence[dict[str, Any]]) -> None:
    """Score after each round's steps, one line for each candidate, the first two in colours."""
    for row in ranking:
        own = {
            r["steps"]: nan if r["score"] is None else r["score"] for r in rounds if r["candidate"] == row["candidate"]
        }
        best = row["rank"] <= 2
        color = _FIRST_TWO[row["rank"] - 1] if best else "0.6"
        label = short(row["candidate"]) if best else None
        axes.plot(list(own), list(own.values()), "o-", markersize=2.5, linewidth=1.2 if best else 0.7, color=color,
                  zorder=3 if best else 2, label=label)  # fmt: skip
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xlabel("steps of the run")
    axes.grid(axis="y", linewidth=0.3, alpha=0.6)
    axes.legend(loc="lower right")


write = draw.write

if __name__ == "__main__":
    draw.command(__doc__)
