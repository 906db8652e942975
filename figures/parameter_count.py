"""Numbers of parameters that Propulsion trains, and of the whole model, with one row for each model."""

from matplotlib.figure import Figure

from analyses.records import Result
from figures.figure import figure
from figures.style import PAGE_WIDTH, PALETTE

_SHOWN = {"attn": "query, key, value", "blocks": "block Linears", "everything": "every Linear and Embedding",
          "total": "whole model"}  # fmt: skip


@figure("parameter_count")
def draw(result: Result) -> Figure:
    """Parameters that Propulsion trains in each of the paper's models, by choice of layers, and of the whole model.
    Counts, without intervals.
    """
    rows = result.tables["counts"]
    page = Figure(figsize=(PAGE_WIDTH, 0.26 * len(rows) + 0.8), layout="constrained")
    ax = page.subplots()
    for place, (count, words) in enumerate(_SHOWN.items()):
        ax.plot([row[count] for row in rows], range(len(rows)), "osD^"[place], color=PALETTE[place], label=words,
                markersize=4)  # fmt: skip
    ax.set_yticks(range(len(rows)), [row["model"] for row in rows])
    ax.invert_yaxis()
    ax.set(xscale="log", xlabel="parameters")
    ax.grid(axis="x", linewidth=0.3, alpha=0.6)
    page.legend(loc="outside lower center", ncols=len(_SHOWN))
    return page


write = draw.write

if __name__ == "__main__":
    draw.command(__doc__)
