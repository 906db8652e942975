"""Methods by their kernels, from a result folder: how close each is to full fine-tuning, and to each other.

Above, the centred alignment (CKA) of each method's kernel with that of full fine-tuning; bars are 95 % bootstrap
intervals over examples; a null model's reaches over all of its draws. Propulsion is orange, null models are grey
squares on a grey ground. Below, the CKA of every two methods, in the same order.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analyses.results import STAGES, Metric, Result, load_result
from figures.style import COLUMN_WIDTH, PALETTE, SEQUENTIAL, save, style
from propulsion.errors import run_command

_STAGE = STAGES[0]
# Inches: a method's row above, and the map with its bar.
_ROW, _MAP = 0.135, 2.45


def draw(result: Result) -> Figure:
    """Draw both panels, one column wide, methods ordered by their CKA with full fine-tuning.

    Raises:
        UserError: the result lacks a metric.
    """
    full, *others = [row["method"] for row in result.tables["methods"]]
    found = {name: result.metric("cka", stage=_STAGE, left=full, right=name) for name in others}
    nulls = {
        row["null"]: result.metric("cka", stage=_STAGE, left=full, right=row["null"]) for row in result.tables["nulls"]
    }
    order = sorted(others, key=lambda name: -np.nan_to_num(found[name].value, nan=-1))
    height = _ROW * (len(order) + len(nulls))
    with style():
        figure = Figure(figsize=(COLUMN_WIDTH, height + _MAP + 0.7), layout="constrained")
        above, below = figure.subplots(2, 1, height_ratios=(height, _MAP))
        _dots(above, [found[name] for name in order], order, nulls, full)
        _similarity(below, result, [full, *order])
        figure.draw_without_rendering()
    return figure


def write(result: Result, folder: Path | str) -> list[Path]:
    """Draw and write `peft_kernels.png` and `.pdf`."""
    return save(draw(result), folder, "peft_kernels")


def _dots(axes: Axes, metrics: list[Metric], names: list[str], nulls: dict[str, Metric], full: str) -> None:
    labels = [*names, *nulls]
    rows = [*metrics, *nulls.values()]
    for place, metric in enumerate(rows):
        null = place >= len(names)
        color = "0.45" if null else PALETTE[1] if names[place].startswith("Propulsion") else PALETTE[0]
        low, high = (metric.value if end is None else end for end in (metric.low, metric.high))
        ends = [[metric.value - low], [high - metric.value]]
        axes.errorbar([metric.value], [place], xerr=np.clip(ends, 0, None), fmt="s" if null else "o", markersize=3,
                      linewidth=0.9, color=color)  # fmt: skip
    axes.axhspan(len(names) - 0.5, len(labels) - 0.5, color="0.93", zorder=0)
    axes.set_yticks(range(len(labels)), map(_short, labels))
    axes.set(ylim=(len(labels) - 0.5, -0.5), xlim=(min(0.0, *axes.get_xlim()), 1.02))
    axes.grid(axis="x", color="0.88", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.set_title(f"CKA with {full}")


def _similarity(axes: Axes, result: Result, names: list[str]) -> None:
    values = {(row["left"], row["right"]): row["cka"] for row in result.tables["similarity"]}
    matrix = np.array([[np.nan if (v := values[a, b]) is None else v for b in names] for a in names])
    image = axes.imshow(matrix, cmap=SEQUENTIAL, vmin=0, vmax=1)
    axes.set_yticks(range(len(names)), map(_short, names), fontsize=6)
    axes.set_xticks([])
    axes.set_title("CKA between methods")
    figure = axes.figure
    assert isinstance(figure, Figure)
    figure.colorbar(image, ax=axes, location="bottom", aspect=30, pad=0.02, fraction=0.05)


def _short(name: str) -> str:
    """A name without its counts, which would take the column's width; the tables have them."""
    return re.sub(r" of (size )?[\d,]+( weights)?$", "", name).replace("examples ", "").replace("_", " ")


def main(result: tyro.conf.Positional[Path], output_dir: Path | None = None) -> None:
    """Draw a peft_kernels result again, as PNG and PDF.

    Args:
        result: Result folder, as written by python -m analyses.peft_kernels.
        output_dir: Where to write the figure; the result folder if not given.
    """
    for path in write(load_result(result, analysis="peft_kernels"), output_dir or result):
        print(path)


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main, prog="python -m figures.peft_kernels"))
