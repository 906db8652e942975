"""Theorem 1, literal, corrected and up to scale, case by case, from a result folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure

from analyses.results import Result, load_result
from figures.style import PAGE_WIDTH, PALETTE, save, style
from propulsion.errors import run_command

SMALLEST = 1e-16
LOOKS = {
    "literal": ("all of full fine-tuning, as claimed", "o"),
    "best_scale": ("the same, at the best single scale", "^"),
    "corrected": ("full fine-tuning of the weights", "s"),
}


def draw(result: Result) -> Figure:
    """Relative distance of Propulsion's kernel from three kernels of full fine-tuning, one line a case."""
    rows = result.tables["cases"]
    places = np.arange(len(rows))[::-1]
    with style():
        figure = Figure(figsize=(PAGE_WIDTH, 0.27 * len(rows) + 0.95), layout="constrained")
        axes = figure.subplots()
        for (key, (words, marker)), color in zip(LOOKS.items(), PALETTE):
            values = np.maximum([row[key] for row in rows], SMALLEST)
            axes.plot(values, places, marker, color=color, markersize=5, fillstyle="none", label=words)
        for place in places:
            axes.axhline(place, color="0.9", linewidth=0.6, zorder=0)
        axes.axvline(1, color="0.6", linewidth=0.6, linestyle=":")
        axes.set(xscale="log", xlabel="relative distance of K_P, ‖K − K_P‖ / ‖K‖ (10⁻¹⁶: rounding)")
        axes.set_yticks(places, [f"{row['case']} ({row['compared']})" for row in rows])
        axes.tick_params(axis="y", length=0)
        figure.legend(loc="outside upper center", ncols=3)
    return figure


def write(result: Result, folder: Path) -> list[Path]:
    """Draw into a folder."""
    return save(draw(result), folder, "theorem1")


def main(result: tyro.conf.Positional[Path], output_dir: Path | None = None) -> None:
    """Draw a theorem1 result again, as PNG and PDF.

    Args:
        result: Result folder, as written by python -m analyses.theorem1.
        output_dir: Where to write the figure; the result folder if not given.
    """
    for path in write(load_result(result, analysis="theorem1"), output_dir or result):
        print(path)


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main, prog="python -m figures.theorem1"))
