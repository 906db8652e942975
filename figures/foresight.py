"""Predictors of the best method: how well they order the candidates, and what their first choice loses.

python -m figures.foresight results/foresight
"""

from typing import Any

from matplotlib.figure import Figure

from analyses.records import RecordError, Result
from figures.figure import figure
from figures.style import PAGE_WIDTH, PALETTE, bar_handle, mark_handle

_ROW_HEIGHT = 0.17


@figure("foresight")
def draw(result: Result) -> Figure:
    """Left: Spearman's rank correlation of each predictor with the final scores at automatic rates, mean over tasks.
    Right: regret of its first choice, in points. Bars are 95 % bootstrap intervals over tasks and seeds; colours say
    when a predictor is known, and the dashed line is the rank correlation of two seeds.

    Raises:
        RecordError: The result scores no predictor.
    """
    rows = [row for row in result.tables["scores"] if row["truth"] == result.tables["scores"][0]["truth"]]
    if not rows:
        raise RecordError("the result scores no predictor")
    rows.sort(key=lambda row: (row["rho"] is not None, row["rho"] or 0.0))
    kinds = list(dict.fromkeys(row["kind"] for row in result.tables["scores"]))
    colors = {kind: PALETTE[i % len(PALETTE)] for i, kind in enumerate(kinds)}
    page = Figure(figsize=(PAGE_WIDTH, _ROW_HEIGHT * len(rows) + 0.9), layout="constrained")
    left, right = page.subplots(1, 2, sharey=True)
    for place, row in enumerate(rows):
        for axes, key in ((left, "rho"), (right, "regret")):
            _mark(axes, place, row, key, colors[row["kind"]])
    top = result.tables["ceiling"][0]["rho"]
    if top is not None:
        left.axvline(top, linestyle="--", color="0.4", linewidth=0.8)
    left.axvline(0, color="0.7", linewidth=0.6)
    left.set_yticks(range(len(rows)), [row["predictor"] for row in rows])
    left.set_xlabel("rank correlation with the final scores")
    right.set_xlabel("regret of the first choice, points")
    for axes in (left, right):
        axes.grid(axis="x", linewidth=0.3, alpha=0.6)
    handles = [mark_handle(kind, color=color) for kind, color in colors.items()]
    page.legend(handles=[*handles, bar_handle("95 % interval", horizontal=True)], loc="outside lower center", ncols=3)
    return page


def _mark(axes: Any, place: int, row: dict[str, Any], key: str, color: str) -> None:
    if row[key] is None:
        return
    if row[f"{key}_low"] is not None:
        axes.plot([row[f"{key}_low"], row[f"{key}_high"]], [place, place], color=color, linewidth=1)
    axes.plot([row[key]], [place], "o", markersize=3, color=color)


write = draw.write

if __name__ == "__main__":
    draw.command(__doc__)
