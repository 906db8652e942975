"""Plain-text and Markdown tables of results."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import wraps

from analyses.records.result import Metric, Result

Block = str | tuple[Sequence[str], Sequence[Sequence[str]]]
"""A part of a summary: a paragraph of text, or a table given by its header and rows."""


def number(value: float | None) -> str:
    """A number as text: about three significant digits, an exponent only where needed, "-" if it is not finite."""
    if value is None or not math.isfinite(value):
        return "-"
    magnitude = abs(value)
    if value == 0 or 0.001 <= magnitude < 100_000:
        digits = 3 if magnitude < 10 else 1 if magnitude < 1000 else 0
        return f"{value:,.{digits}f}"
    return f"{value:.2e}"


def interval(value: float | None, low: float | None, high: float | None) -> str:
    """The text ``value [low, high]``, or the value alone where an end is missing or not finite."""
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return number(value)
    return f"{number(value)} [{number(low)}, {number(high)}]"


def metric_cell(metric: Metric | None) -> str:
    """The text of a metric with its interval, as `interval` writes it; "-" for None."""
    return "-" if metric is None else interval(metric.value, metric.low, metric.high)


def summary_of_blocks(blocks: Callable[[Result], Iterator[Block]]) -> Callable[..., str]:
    """Turn a function that yields the parts of a summary into a function that returns the summary as text.

    The returned function takes a result, and ``markdown=True`` for Markdown tables.
    """

    @wraps(blocks)
    def summary(result: Result, *, markdown: bool = False) -> str:
        found = blocks(result)
        return "\n\n".join(b if isinstance(b, str) else format_table(*b, markdown=markdown) for b in found)

    return summary


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, markdown: bool = False) -> str:
    """Text of a table whose columns are padded to their widest cell, the first aligned left and the others right."""
    cells = [list(header), *map(list, rows)]
    if markdown:  # An unescaped "|" would end the cell.
        cells = [[cell.replace("|", r"\|") for cell in row] for row in cells]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |" if markdown else "  ".join(padded).rstrip()

    rule = ["-" * w if i == 0 else "-" * (w - 1) + (":" if markdown else "-") for i, w in enumerate(widths)]
    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])
