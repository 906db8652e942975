"""The error of inner products under random projection: its tail (drawn, bound and exact) and its variance."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analyses.records import Result
from figures.figure import figure
from figures.style import PAGE_WIDTH, PALETTE, mark_handle


@figure("johnson_lindenstrauss")
def draw(result: Result) -> Figure:
    """Left: probability of an error of at least ε over the dimension; lines exact, dashes the bound, dots drawn. Right:
    d times the variance. Bars are 99.9 % intervals of the draws.
    """
    cells, rows, curves = (result.tables[name] for name in ("tail", "variance", "curves"))
    rho = curves[0]["rho"]
    page = Figure(figsize=(PAGE_WIDTH, 2.8), layout="constrained")
    left, right = page.subplots(1, 2, width_ratios=(3, 2))
    floor = 1 / (3 * result.config["draws"])
    epsilons = sorted({c["epsilon"] for c in cells})
    for epsilon, color in zip(epsilons, PALETTE):
        curve = [c for c in curves if c["epsilon"] == epsilon]
        d = np.array([c["d"] for c in curve])
        left.plot(d, [c["exact"] for c in curve], color=color, label=rf"$\varepsilon$ = {epsilon:g}")
        left.plot(d, [c["bound"] for c in curve], color=color, linestyle="--", linewidth=0.9)
        seen = [c for c in cells if (c["rho"], c["epsilon"]) == (rho, epsilon) and c["probability"] > 0]
        ends = np.array([[c["lower"], c["probability"], c["upper"]] for c in seen]).reshape(-1, 3).T
        left.errorbar([c["d"] for c in seen], ends[1], np.diff(ends, axis=0), color=color, fmt="o", markersize=2.5,
                      linewidth=0.8)  # fmt: skip
    left.set(xscale="log", yscale="log", ylim=(floor, 2), xlabel="dimension d",
             ylabel=r"$\Pr[\,|S - \rho| \geq \varepsilon\,]$", title=rf"Tail at $\rho$ = {rho:g}")  # fmt: skip
    kinds = [Line2D([], [], color="0.4", label="exact"),
             Line2D([], [], color="0.4", linestyle="--", linewidth=0.9, label="bound"),
             mark_handle(f"drawn, {result.config['confidence']:.1%} interval")]  # fmt: skip
    page.legend(handles=[*left.get_legend_handles_labels()[0], *kinds], loc="outside lower center", ncols=4)
    fine = np.linspace(-1, 1, 101)
    right.plot(fine, 1 + fine**2, color="0.3", label=r"exact, $1 + \rho^2$")
    dimensions = sorted({r["d"] for r in rows})
    for i, (d, color) in enumerate(zip(dimensions[:: max(1, len(dimensions) // 3)], PALETTE)):
        line = [r for r in rows if r["d"] == d]
        ends = d * np.array([[r["lower"], r["variance"], r["upper"]] for r in line]).T
        x = np.array([r["rho"] for r in line]) + 0.02 * i
        right.errorbar(x, ends[1], np.diff(ends, axis=0), color=color, fmt="o", markersize=2.5, linewidth=0.8,
                       label=f"drawn, d = {d}")  # fmt: skip
    right.set(xlabel=r"inner product $\rho$", ylabel=r"$d \cdot \mathrm{Var}[S]$", title="Variance")
    right.legend(loc="upper center")
    return page


write = draw.write

if __name__ == "__main__":
    draw.command(__doc__)
