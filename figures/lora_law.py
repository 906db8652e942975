"""The CKA of LoRA's kernel with that of full fine-tuning over the rank: predicted from the gradients, and drawn."""

import numpy as np
from matplotlib.figure import Figure

from analyses.records import Result
from figures.figure import figure
from figures.style import PAGE_WIDTH, PALETTE


@figure("lora_law")
def draw(result: Result) -> Figure:
    """The line is limit / sqrt(1 + c / rank), the mean over seeds, computed from the gradients of the weights and not
    fitted. Dots are means over draws of LoRA's matrices, bars their 95 % intervals.
    """
    rows, laws = result.tables["ranks"], result.tables["laws"]
    page = Figure(figsize=(PAGE_WIDTH / 2, 2.6), layout="constrained")
    axes = page.subplots()
    ranks = np.geomspace(rows[0]["rank"], rows[-1]["rank"], 100)
    line = np.mean([law["limit"] / np.sqrt(1 + law["constant"] / ranks) for law in laws], axis=0)
    axes.plot(ranks, line, color=PALETTE[0], label="predicted")
    measured = np.array([row["measured"] for row in rows])
    axes.plot([row["rank"] for row in rows], measured, "o", color=PALETTE[1], markersize=3.5, label="drawn")
    for row in rows:
        if row["low"] is not None:
            axes.plot([row["rank"]] * 2, [row["low"], row["high"]], color=PALETTE[1], linewidth=0.9)
    axes.set(xscale="log", ylim=(0, 1.02), xlabel="rank of LoRA", ylabel="CKA with full fine-tuning")
    axes.set_xticks([row["rank"] for row in rows], [str(row["rank"]) for row in rows])
    axes.minorticks_off()
    axes.legend(loc="lower right")
    return page


write = draw.write

if __name__ == "__main__":
    draw.command(__doc__)
