"""A heat map of numbers by layer: a line for each block, a column for each kind of layer."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.image import AxesImage

from figures.style import SEQUENTIAL

_TEXT = 6.0
WRITTEN = 16
"""The largest number of lines with numbers in their cells."""

Row = dict[str, Any]
Line = tuple[str, int | None]


def lines_of(rows: Sequence[Row]) -> tuple[list[Line], list[str]]:
    """The lines of a map, ("", block) or (kind, None) for layers outside of blocks, and the kinds in its columns."""
    lines = dict.fromkeys((row["kind"] if row["block"] is None else "", row["block"]) for row in rows)
    return list(lines), list(dict.fromkeys(row["kind"] for row in rows if row["block"] is not None))


def panel(
    axes: Axes, rows: Sequence[Row], lines: Sequence[Line], kinds: Sequence[str], column: str,
    norm: Normalize, words: Callable[[float], str] | None,
) -> AxesImage:  # fmt: skip
    """Draw one matrix, with the numbers in its cells as `words` writes them, or without if it is None."""
    matrix = np.full((len(lines), max(1, len(kinds))), np.nan)
    for row in rows:
        whole = row["block"] is None
        line = lines.index((row["kind"] if whole else "", row["block"]))
        value = np.nan if row[column] is None else row[column]
        place = (matrix.shape[1] - 1) / 2 if whole else kinds.index(row["kind"])
        matrix[line, slice(None) if whole else int(place)] = value
        if words and np.isfinite(value):
            axes.text(place, line, words(value), ha="center", va="center", fontsize=_TEXT,
                      color="white" if norm(value) < 0.6 else "black")  # fmt: skip
    axes.set_facecolor("0.92")  # Visible where there is no value.
    image = axes.imshow(np.ma.masked_invalid(matrix), cmap=SEQUENTIAL, norm=norm, aspect="auto")
    axes.hlines(np.arange(1, len(lines)) - 0.5, -0.5, matrix.shape[1] - 0.5, color="white", linewidth=0.6)
    blocks = [i for i, (_, block) in enumerate(lines) if block is not None]
    if blocks:
        axes.vlines(np.arange(1, len(kinds)) - 0.5, blocks[0] - 0.5, blocks[-1] + 0.5, color="white", linewidth=0.6)
    if words:
        axes.set_xticks(range(len(kinds)), [kind.replace(" ", "\n") for kind in kinds], fontsize=_TEXT)
    else:
        axes.set_xticks(range(len(kinds)), kinds, rotation=90)
    axes.set_yticks(range(len(lines)), [kind if block is None else f"block {block}" for kind, block in lines])
    axes.tick_params(length=0)
    return image
