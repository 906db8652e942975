"""Methods against each other: score with its interval, beside the number of parameters trained, one panel a task."""

from pathlib import Path

from matplotlib.figure import Figure

from analyses.records import Result, UserError
from figures.command import command
from figures.style import PAGE_WIDTH, PALETTE, save, style

_ROW_HEIGHT = 0.19


def draw(result: Result) -> Figure:
    """Draw one panel a task: the headline score of every method, its interval, and its trained parameters.

    Raises:
        UserError: The result holds no task.
    """
    tasks = list(dict.fromkeys(row["task"] for row in result.tables["summary"]))
    if not tasks:
        raise UserError("the result holds no task to draw")
    methods = list(dict.fromkeys(row["method"] for row in result.tables["summary"]))
    columns = min(2, len(tasks))
    lines = -(-len(tasks) // columns)
    with style():
        size = (PAGE_WIDTH, lines * (_ROW_HEIGHT * len(methods) + 0.6))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False)
        for ax in axes.flat[len(tasks) :]:
            ax.set_visible(False)
        for ax, task in zip(axes.flat, tasks):
            metric = next(m.name for m in result.metrics if m.stage == task)
            for place, method in enumerate(reversed(methods)):
                found = result.metric(metric, stage=task, left=method)
                low, high = (found.value if end is None else end for end in (found.low, found.high))
                color = PALETTE[1] if method.startswith("propulsion") else PALETTE[0]
                ax.plot([low, high], [place, place], color=color)
                ax.plot([found.value], [place], "o", markersize=3.5, color=color)
            trained = {row["method"]: row["trained_parameters"] for row in result.tables["summary"]}
            ax.set_yticks(range(len(methods)), [f"{short(m)}  {trained[m]:,}" for m in reversed(methods)])
            ax.set_xlabel(metric)
            seeds = next(row["seeds"] for row in result.tables["summary"] if row["task"] == task)
            ax.set_title(f"{task}, {seeds} seed{'s' if seeds > 1 else ''}", loc="left")
            ax.grid(axis="x", linewidth=0.3, alpha=0.6)
        figure.draw_without_rendering()
    return figure


def short(method: str) -> str:
    """A method's name for a figure.

    >>> short("propulsion:positions=attn")
    'propulsion attn'
    """
    name, _, options = method.partition(":")
    return f"{name} {options.removeprefix('positions=')}".strip()


def write(result: Result, folder: Path | str) -> list[Path]:
    """Draw and write `method_comparison.png` and `.pdf`.

    Raises:
        UserError: As `draw` does, or if the folder cannot be written.
    """
    return save(draw(result), folder, "method_comparison")


if __name__ == "__main__":
    command("method_comparison", write, __doc__)
