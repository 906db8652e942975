"""Distances of the two kernels in Theorem 1, as stated, corrected and up to scale, by case and by position."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analyses.records import Result
from figures.figure import figure
from figures.style import PAGE_WIDTH, PALETTE

EXACT = 1e-12
LOOKS = {
    "literal": ("all of full fine-tuning, as claimed", "o"),
    "best_scale": ("the same, at the best single scale", "^"),
    "corrected": ("full fine-tuning of the weights", "s"),
}


@figure("theorem1")
def draw(result: Result) -> Figure:
    """Left: relative distance of Propulsion's kernel from that of full fine-tuning, by case. Right: of each position of
    random transformers from its own weights. Means over networks; no interval is drawn.
    """
    rows = result.tables["cases"]
    page = Figure(figsize=(PAGE_WIDTH, 0.24 * len(rows) + 1.25), layout="constrained")
    left, right = page.subplots(1, 2, width_ratios=(5, 4))
    _cases(left, rows)
    _positions(right, result.tables["positions"])
    page.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=1)
    page.legend(*right.get_legend_handles_labels(), loc="outside lower right", ncols=2, columnspacing=1)
    return page


def _cases(axes: Axes, rows: list[dict]) -> None:
    places = np.arange(len(rows))[::-1]
    for (key, (words, marker)), color, size in zip(LOOKS.items(), PALETTE, (6.5, 4.5, 2.5)):
        values = [row[key] for row in rows]
        axes.plot(values, places, marker, color=color, markersize=size, fillstyle="none", label=words)
    for place, row in zip(places, rows):
        names = {"literal": "claim", "corrected": "of the weights"}
        if exact := [words for key, words in names.items() if row[key] < EXACT]:
            text = "exact" if len(exact) == 2 else f"{exact[0]}: exact"
            axes.annotate(text, (0.0, place), (9 if len(exact) == 2 else 4, 4), textcoords="offset points", color="0.4")
    _lines(axes, places)
    words = r"relative distance of $K_P$, $\|K - K_P\|\,/\,\|K\|$"
    axes.set(xlim=(-0.04, 1.08), xlabel=words, title="From full fine-tuning, by case")
    axes.set_yticks(places, [r["case"] + ("" if "," in r["case"] else f", {r['compared']}") for r in rows])


def _positions(axes: Axes, rows: list[dict]) -> None:
    positions = list(dict.fromkeys(row["position"] for row in rows))
    networks = list(dict.fromkeys(row["network"] for row in rows))
    places = np.arange(len(positions))[::-1]
    for network, shade in zip(networks, np.linspace(0.75, 0.0, len(networks)), strict=True):
        values = {row["position"]: row["best_scale"] for row in rows if row["network"] == network}
        axes.plot([values[p] for p in positions], places, "o", markersize=4, color=str(shade), label=network)
    _lines(axes, places)
    axes.set_yticks(places, positions)
    title = "From the layer's own weights, by position"
    axes.set(xscale="log", xlabel="relative distance at the best scale", title=title)
    axes.set_xticks([0.05, 0.1, 0.2, 0.5], ["0.05", "0.1", "0.2", "0.5"])
    axes.minorticks_off()


def _lines(axes: Axes, places: np.ndarray) -> None:
    for place in places:
        axes.axhline(place, color="0.9", linewidth=0.6, zorder=0)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(-0.6, len(places) - 0.4)


write = draw.write

if __name__ == "__main__":
    draw.command(__doc__)
