"""Similarity of each method to full fine-tuning: centred alignment (CKA) of the two kernels, one dot for each method.

Bars are 95 % intervals over seeds, or over examples of a single seed. Propulsion is orange; null models are grey
squares on a grey background.
"""

import re

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analyses.records import STAGES, Metric, Result
from figures.figure import figure
from figures.methods import color_of_method
from figures.style import COLUMN_WIDTH, bar_handle, mark_handle

_STAGE = STAGES[0]
_ROW = 0.135
"""Inches of a method's row."""


@figure("peft_kernels")
def draw(result: Result) -> Figure:
    """CKA of each method's kernel with that of full fine-tuning; bars are 95 % intervals over seeds, or over
    examples of a single seed; null models are squares on grey ground.

    Raises:
        RecordError: the result lacks a metric.
    """
    full, *others = [row["method"] for row in result.tables["methods"]]
    nulls = [row["null"] for row in result.tables["nulls"]]
    found = {name: result.metric("cka", stage=_STAGE, left=full, right=name) for name in (*others, *nulls)}
    order = sorted(others, key=lambda name: -np.nan_to_num(found[name].value, nan=-1))
    page = Figure(figsize=(COLUMN_WIDTH, _ROW * len(found) + 0.7), layout="constrained")
    _dots(page.subplots(), [found[name] for name in (*order, *nulls)], len(nulls))
    handles = [mark_handle("Propulsion", color=color_of_method("Propulsion")),
               mark_handle("other", color=color_of_method("other")), mark_handle("null model", "s", color="0.45"),
               bar_handle("95 % interval", horizontal=True)]  # fmt: skip
    page.legend(handles=handles, loc="outside lower center", ncols=4, handletextpad=0.1, columnspacing=0.8)
    return page


def _dots(axes: Axes, metrics: list[Metric], nulls: int) -> None:
    """Draw one row for each metric; the last ones, `nulls` in number, are null models."""
    labels = [metric.right for metric in metrics]
    methods = len(metrics) - nulls
    for place, metric in enumerate(metrics):
        null = place >= methods
        color = "0.45" if null else color_of_method(metric.right)
        low, high = (metric.value if end is None else end for end in (metric.low, metric.high))
        ends = [[metric.value - low], [high - metric.value]]
        axes.errorbar([metric.value], [place], xerr=np.clip(ends, 0, None), fmt="s" if null else "o", markersize=3,
                      linewidth=0.9, color=color)  # fmt: skip
    axes.axhspan(methods - 0.5, len(labels) - 0.5, color="0.93", zorder=0)
    axes.set_yticks(range(len(labels)), map(_short, labels))
    axes.set(ylim=(len(labels) - 0.5, -0.5), xlim=(min(0.0, *axes.get_xlim()), 1.02))
    axes.grid(axis="x", color="0.88", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.set_title(f"CKA with {metrics[0].left}")


def _short(name: str) -> str:
    """A name without its counts, for which the column is too narrow; the tables show them."""
    return re.sub(r" of (size )?[\d,]+( weights)?$", "", name).replace("examples ", "").replace("_", " ")
