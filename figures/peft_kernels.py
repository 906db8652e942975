"""Methods by their kernels, from a result folder: how close each is to full fine-tuning, to each other, and where.

`peft_kernels` shows the centred alignment (CKA) of each method's kernel with that of full fine-tuning; bars are 95 %
bootstrap intervals over seeds and examples; a null model's reaches over all of its draws. Propulsion is orange, null
models are grey squares on a grey ground. `peft_kernels_map` (`figures.peft_map`) shows the CKA of every two methods
and the methods as points, `peft_kernels_layers` (`figures.peft_layers`) which layers carry the agreement.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analyses.records import STAGES, Metric, Result
from figures import peft_layers, peft_map
from figures.command import command
from figures.style import COLUMN_WIDTH, PALETTE, save, style

_STAGE = STAGES[0]
_ROW = 0.135
"""Inches of a method's row."""


def draw(result: Result) -> Figure:
    """Draw the methods as dots, one column wide, ordered by their CKA with full fine-tuning.

    Raises:
        UserError: the result lacks a metric.
    """
    full, *others = [row["method"] for row in result.tables["methods"]]
    found = {name: result.metric("cka", stage=_STAGE, left=full, right=name) for name in others}
    nulls = {
        row["null"]: result.metric("cka", stage=_STAGE, left=full, right=row["null"]) for row in result.tables["nulls"]
    }
    order = sorted(others, key=lambda name: -np.nan_to_num(found[name].value, nan=-1))
    with style():
        figure = Figure(figsize=(COLUMN_WIDTH, _ROW * (len(order) + len(nulls)) + 0.5), layout="constrained")
        _dots(figure.subplots(), [found[name] for name in order], order, nulls, full)
        figure.draw_without_rendering()
    return figure


def write(result: Result, folder: Path | str) -> list[Path]:
    """Draw and write all three figures, as PNG and PDF."""
    return [
        *save(draw(result), folder, "peft_kernels"),
        *save(peft_map.draw(result), folder, "peft_kernels_map"),
        *save(peft_layers.draw(result), folder, "peft_kernels_layers"),
    ]


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


def _short(name: str) -> str:
    """A name without its counts, which would take the column's width; the tables have them."""
    return re.sub(r" of (size )?[\d,]+( weights)?$", "", name).replace("examples ", "").replace("_", " ")


if __name__ == "__main__":
    command("peft_kernels", write, __doc__)
