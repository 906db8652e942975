"""Short names and colours of fine-tuning methods, which are the same in all figures, and the line of no learning."""

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes

from figures.style import PALETTE

ONE_ANSWER = "best single answer"
_ONE_ANSWER = {"matthews": 0.0, "pearson": 0.0, "spearman": 0.0}
"""Scores of a constant answer by metrics for which it does not depend on the rows."""


def short(method: str) -> str:
    """A method's name for a figure.

    >>> short("propulsion:positions=attn")
    'propulsion attn'
    """
    name, _, options = method.partition(":")
    return f"{name} {options.removeprefix('positions=')}".strip()


def color_of_method(method: str) -> str:
    """The colour of a method where Propulsion is contrasted with all others: orange for Propulsion, blue for others."""
    return PALETTE[1] if method.lower().startswith("propulsion") else PALETTE[0]


def color_of_line(place: int) -> str:
    """The colour of a method by its place in the list of methods; colours repeat if there are more methods."""
    return PALETTE[place % len(PALETTE)]


def draw_one_answer(axes: Axes, dataset: Mapping[str, Any], *, vertical: bool = False) -> None:
    """Draw the score of the best single answer, such as the majority class, where a result holds or implies it.

    Args:
        axes: Where scores are drawn.
        dataset: Entry `dataset` of a result: its "chance" if it is there, else the value that "metric" implies.
        vertical: Whether scores are on the horizontal axis.
    """
    score = dataset.get("chance", _ONE_ANSWER.get(dataset.get("metric", "")))
    if score is not None:
        line = axes.axvline if vertical else axes.axhline
        line(score, color="0.35", linewidth=0.9, linestyle=(0, (4, 2)), zorder=1, label=ONE_ANSWER)
