"""The degree that matches the kernels' sizes, over width, depth and models, from a result folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure

from analyses.results import Result, load_result
from figures.style import PAGE_WIDTH, PALETTE, save, style
from propulsion.errors import run_command

PAPER_BEST = (25, 75)


def draw(result: Result) -> Figure:
    """Left: k* over width, of random networks and architectures and the pre-trained encoder. Right: over depth."""
    rows = result.tables["ratios"]
    with style():
        figure = Figure(figsize=(PAGE_WIDTH, 2.6), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(3, 2), sharey=True)
        mlp = [r for r in rows if r["kind"] == "random network"]
        depths = [r["depth"] for r in mlp]
        common = max(set(depths), key=depths.count)
        _line(left, [r for r in mlp if r["depth"] == common], "width", "ReLU network", PALETTE[6])
        names = sorted({r["model"] for r in rows if r["kind"] == "random architecture"})
        for name, color in zip(names, PALETTE):
            chosen = [r for r in rows if (r["kind"], r["model"]) == ("random architecture", name)]
            _line(left, chosen, "width", f"{name}, random", color)
        for row in (r for r in rows if r["kind"] == "pre-trained"):
            left.plot(row["width"], row["matching_degree"], "*", color=PALETTE[1], markersize=9, label=row["model"])
        left.set(xscale="log", yscale="log", xlabel="width", ylabel="k* = (tr K_F / tr K_P(1))$^{1/2}$")
        widths = [r["width"] for r in mlp]
        middle = max(set(widths), key=widths.count)
        _line(right, [r for r in mlp if r["width"] == middle], "depth", f"ReLU network, width {middle}", PALETTE[6])
        right.set(xscale="log", xlabel="hidden layers")
        for axes in (left, right):
            axes.axhspan(*PAPER_BEST, color="0.9", zorder=0)
        left.annotate("best degrees in the paper", (0.02, np.sqrt(PAPER_BEST[0] * PAPER_BEST[1])), color="0.4",
                      xycoords=("axes fraction", "data"), va="center")  # fmt: skip
        figure.legend(*left.get_legend_handles_labels(), loc="outside right center")
    return figure


def _line(axes, rows, over: str, label: str, color: str) -> None:
    rows = sorted(rows, key=lambda r: r[over])
    axes.plot([r[over] for r in rows], [r["matching_degree"] for r in rows], "o-", color=color, markersize=3,
              label=label)  # fmt: skip


def write(result: Result, folder: Path) -> list[Path]:
    """Draw into a folder."""
    return save(draw(result), folder, "degree_scale")


def main(result: tyro.conf.Positional[Path], output_dir: Path | None = None) -> None:
    """Draw a degree_scale result again, as PNG and PDF.

    Args:
        result: Result folder, as written by python -m analyses.degree_scale.
        output_dir: Where to write the figure; the result folder if not given.
    """
    for path in write(load_result(result, analysis="degree_scale"), output_dir or result):
        print(path)


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main, prog="python -m figures.degree_scale"))
