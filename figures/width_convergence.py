"""Finite networks against their limits: errors, the gap, and the kernels' sizes over width, from a result folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure

from analyses.results import Result, load_result
from figures.style import PAGE_WIDTH, PALETTE, save, style
from propulsion.errors import run_command

MARKERS = "osD^v<>"


def draw(result: Result) -> Figure:
    """Error of K_P over width; gap between K_P and K_F over width; tr K_F / tr K_P in both parametrisations."""
    rows, activations = result.tables["widths"], result.config["activations"]
    widths = np.array(result.config["widths"])

    def column(name: str, activation: str, parametrization: str = "ntk") -> np.ndarray:
        chosen = [r for r in rows if (r["activation"], r["parametrization"]) == (activation, parametrization)]
        return np.array([r[name] for r in sorted(chosen, key=lambda r: r["width"])])

    with style():
        figure = Figure(figsize=(PAGE_WIDTH, 2.7), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        for activation, color, marker in zip(activations, PALETTE, MARKERS):
            look = {"color": color, "marker": marker, "markersize": 3, "linewidth": 1}
            left.plot(widths, column("error_propulsion", activation), label=activation.replace("_", " "), **look)
            middle.plot(widths, column("gap", activation), **look)
            middle.axhline(column("gap_of_the_limits", activation)[0], color=color, linewidth=0.6, linestyle=":")
            right.plot(widths, column("trace_ratio", activation), **look)
            right.plot(widths, column("trace_ratio", activation, "standard"), **look, linestyle="--")
        reference = column("error_propulsion", activations[0])[0] * 1.5
        left.plot(widths, reference * np.sqrt(widths[0] / widths), color="0.6", linewidth=0.8, zorder=0)
        left.annotate("∝ width$^{-1/2}$", (widths[-1], reference * np.sqrt(widths[0] / widths[-1])), color="0.4",
                      ha="right", va="bottom")  # fmt: skip
        left.set(
            xscale="log",
            yscale="log",
            xlabel="width",
            ylabel="relative error",
            title="Propulsion's kernel and its limit",
        )
        middle.set(xscale="log", ylim=(0, None), xlabel="width", ylabel="|K_P / k² − K_F| / |K_F|",
                   title="The gap stands (dotted: its limit)")  # fmt: skip
        right.set(xscale="log", yscale="log", xlabel="width", ylabel="tr K_F / tr K_P",
                  title="NTK (solid), standard (dashed)")  # fmt: skip
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(activations))
    return figure


def write(result: Result, folder: Path) -> list[Path]:
    """Draw into a folder."""
    return save(draw(result), folder, "width_convergence")


def main(result: tyro.conf.Positional[Path], output_dir: Path | None = None) -> None:
    """Draw a width_convergence result again, as PNG and PDF.

    Args:
        result: Result folder, as written by python -m analyses.width_convergence.
        output_dir: Where to write the figure; the result folder if not given.
    """
    for path in write(load_result(result, analysis="width_convergence"), output_dir or result):
        print(path)


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main, prog="python -m figures.width_convergence"))
