"""A map of methods by their kernels: the CKA of every two methods, and points that are near where it is high.

Points are the classical scaling of the distances sqrt(2 (1 - CKA)), in equal units on both axes. The label of an axis
states its share of the variance. What the two axes leave out distorts the map, so its title counts the pairs of methods
of which the one with the lower CKA is drawn nearer to full fine-tuning. Orange is Propulsion, on the layers named; the
star is full fine-tuning.
"""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.optimize import isotonic_regression

from analyses.records import Result
from figures.figure import figure
from figures.methods import color_of_method
from figures.style import PAGE_WIDTH, PALETTE, SEQUENTIAL

_ROW, _MAP = 0.15, 3.1
_TEXT = 6.0
_TIED = 1e-9
_COLUMN = 0.22
"""Share of the map's width that labels take on either side."""

Points = dict[str, tuple[float, float]]


@figure("peft_kernels_map")
def draw(result: Result) -> Figure:
    """Above: CKA of every two methods' kernels, ordered by their CKA with full fine-tuning. Below: the methods as
    points that are roughly nearer where it is higher (classical scaling). Means over seeds; no interval is drawn.
    """
    names = [row["method"] for row in result.tables["methods"]]
    values = {(row["left"], row["right"]): row["cka"] for row in result.tables["similarity"]}
    order = sorted(names, key=lambda name: -(values[names[0], name] or -1.0))
    points = {row["method"]: (row["x"], row["y"]) for row in result.tables["embedding"]}
    shares = {row["axis"]: row["share"] for row in result.tables["embedding_axes"]}
    height = _ROW * len(names)
    page = Figure(figsize=(PAGE_WIDTH, height + _MAP + 0.7), layout="constrained")
    # Separate subfigures; otherwise the map would reserve as much room for names at its left as the matrix.
    above, below = page.subfigures(2, 1, height_ratios=(height + 0.25, _MAP + 0.45))
    _similarity(above.subplots(), values, order)
    axes = below.subplots()
    _points(axes, points, shares, names[0])
    wrong, pairs = inverted(points, {name: values[names[0], name] for name in names[1:]}, names[0])
    order_of = f"{wrong} of {pairs} pairs of methods are in the wrong order from {names[0]}"
    axes.set_title(f"A rough map: nearer mostly means a higher CKA; {order_of}")
    return page


def inverted(points: Points, cka: Mapping[str, float | None], full: str) -> tuple[int, int]:
    """Count pairs of methods of which the one with the lower CKA is nearer on the map, and all pairs.

    Args:
        points: Places of the methods.
        cka: CKA of every other method with full fine-tuning; None where it is undefined, which leaves the method out.
        full: Name of full fine-tuning.
    """
    known = {name: value for name, value in cka.items() if value is not None}
    distance = {name: math.dist(points[name], points[full]) for name in known}
    pairs = list(itertools.combinations(distance, 2))
    # Kernels that are equal but for rounding, such as those of query and key, are in no order.
    wrong = sum(bool((known[a] - known[b]) * (distance[a] - distance[b]) > _TIED) for a, b in pairs)
    return wrong, len(pairs)


def _similarity(axes: Axes, values: dict[tuple[str, str], float | None], names: Sequence[str]) -> None:
    matrix = np.array([[np.nan if (v := values[a, b]) is None else v for b in names] for a in names])
    axes.imshow(matrix, cmap=SEQUENTIAL, vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(matrix):
        if np.isfinite(value):
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=_TEXT,
                      color="white" if value < 0.6 else "black")  # fmt: skip
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.set_title("CKA of every two methods, columns in the order of the rows")


def _points(axes: Axes, points: Points, shares: dict[str, float], full: str) -> None:
    """Draw the points in the middle and their names in a column on either side, in an order with few crossing lines."""
    for name, (x, y) in points.items():
        star = name == full
        axes.plot([x], [y], marker="*" if star else "o", markersize=8 if star else 4, color=_color(name, full),
                  linestyle="", zorder=3)  # fmt: skip
    x, y = np.array(list(points.values())).T
    width, height = _limits(axes, x, y)
    middle = (x.min() + x.max()) / 2
    low, high = axes.get_ylim()
    for side in (-1, 1):
        chosen = [n for n in points if (points[n][0] > middle) == (side == 1)]
        chosen.sort(key=lambda n: (points[n][1], n))
        places = _spread([points[n][1] for n in chosen], low + 0.03 * height, high - 0.03 * height, 0.052 * height)
        inner = middle + side * (0.5 - _COLUMN) * width
        for name, place in zip(chosen, places, strict=True):
            axes.plot([points[name][0], inner], [points[name][1], place], color="0.75", linewidth=0.5, zorder=1)
            axes.text(inner + side * 0.005 * width, place, name.replace("_", " "), va="center",
                      ha="left" if side == 1 else "right", color=_color(name, full))  # fmt: skip
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel(f"{shares['x']:.0%} of the variance")
    axes.set_ylabel(f"{shares['y']:.0%} of the variance")


def _color(name: str, full: str) -> str:
    return PALETTE[6] if name == full else color_of_method(name)


def _limits(axes: Axes, x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Set limits with equal units on both axes and room for the columns of names; return width and height."""
    ratio = (PAGE_WIDTH - 0.4) / _MAP  # of the panel
    room = 1 - 2 * _COLUMN - 0.06
    width = max(np.ptp(x) / room, np.ptp(y) * 1.15 * ratio, 1e-6)
    height = width / ratio
    center = ((x.min() + x.max()) / 2, (y.min() + y.max()) / 2)
    axes.set(xlim=(center[0] - width / 2, center[0] + width / 2), ylim=(center[1] - height / 2, center[1] + height / 2))
    axes.set_aspect("equal", adjustable="box")
    return width, height


def _spread(wanted: Sequence[float], low: float, high: float, gap: float) -> list[float]:
    """Ascending places between low and high, close to ascending wanted places, and at least a gap apart if they fit."""
    if not wanted:
        return []
    gap = min(gap, (high - low) / max(1, len(wanted) - 1))
    steps = gap * np.arange(len(wanted))
    # Least squares under place[i + 1] >= place[i] + gap is a monotone fit after the gaps are subtracted.
    fitted = isotonic_regression(np.asarray(wanted) - steps).x
    return (fitted.clip(low, high - steps[-1]) + steps).tolist()
