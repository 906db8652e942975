"""Comparison of methods: score with its interval and number of trained parameters, with one panel for each task."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from analyses.records import RecordError, Result
from figures.figure import figure
from figures.methods import color_of_method, draw_one_answer, short
from figures.style import PAGE_WIDTH, bar_handle, mark_handle

_ROW_HEIGHT = 0.19


@figure("method_comparison")
def draw(result: Result) -> Figure:
    """Score of each method beside its trained parameters; bars are 95 % intervals over other seeds and other
    validation rows, dashes the best single answer. Propulsion is orange.

    Raises:
        RecordError: The result holds no task.
    """
    tasks = list(dict.fromkeys(row["task"] for row in result.tables["summary"]))
    if not tasks:
        raise RecordError("the result holds no task to draw")
    methods = list(dict.fromkeys(row["method"] for row in result.tables["summary"]))
    columns = min(2, len(tasks))
    lines = -(-len(tasks) // columns)
    page = Figure(figsize=(PAGE_WIDTH, lines * (_ROW_HEIGHT * len(methods) + 0.6) + 0.2), layout="constrained")
    axes = page.subplots(lines, columns, squeeze=False)
    for ax in axes.flat[len(tasks) :]:
        ax.set_visible(False)
    for ax, task in zip(axes.flat, tasks):
        metric = next(m.name for m in result.metrics if m.stage == task)
        for place, method in enumerate(reversed(methods)):
            found = result.metric(metric, stage=task, left=method)
            low, high = (found.value if end is None or np.isnan(end) else end for end in (found.low, found.high))
            color = color_of_method(method)
            ax.plot([low, high], [place, place], color=color)
            ax.plot([found.value], [place], "o", markersize=3.5, color=color)
        draw_one_answer(ax, _dataset(result, task, metric), vertical=True)
        trained = {row["method"]: row["trained_parameters"] for row in result.tables["summary"]}
        ax.set_yticks(range(len(methods)), [f"{short(m)}  {trained[m]:,}" for m in reversed(methods)])
        ax.set_xlabel(metric)
        seeds = next(row["seeds"] for row in result.tables["summary"] if row["task"] == task)
        ax.set_title(f"{task}, {seeds} seed{'s' if seeds > 1 else ''}", loc="left")
        ax.grid(axis="x", linewidth=0.3, alpha=0.6)
    marks = [mark_handle("mean over seeds"), bar_handle("95 % interval", horizontal=True)]
    page.legend(handles=[*marks, *axes[0, 0].get_legend_handles_labels()[0]], loc="outside lower center", ncols=3)
    return page


def _dataset(result: Result, task: str, metric: str) -> dict[str, Any]:
    """The metric of a task, and the accuracy of its commonest class if accuracy is the metric."""
    labels = result.arrays.get(f"labels.{task}")
    if metric != "accuracy" or labels is None:
        return {"metric": metric}
    return {"metric": metric, "chance": np.unique(labels, return_counts=True)[1].max() / len(labels)}


write = draw.write

if __name__ == "__main__":
    draw.command(__doc__)
