"""The tables of a result of `analyses.kernel_drift`, for the terminal and for documents."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from analyses.core.comparison import directions
from analyses.kernel_drift.measures import PAIRS, PERMUTED
from analyses.records import STAGES, Block, Metric, Result, metric_cell, number, summary_of_blocks

LAZY = 0.1
"""Training counts as lazy if a relative drift is below this: a tenth of the initial norm."""

_COLUMNS = {
    "kernel drift": "relative_kernel_drift",
    "alignment": "kernel_alignment_with_start",
    "CKA": "kernel_cka_with_start",
    "Jacobian drift": "relative_jacobian_drift",
    "with the start's head": "relative_jacobian_drift_same_head",
    "linearisation error": "linearisation_error",
    "parameters moved": "parameter_drift",
    "head moved": "head_drift",
}
_CKA = _COLUMNS["CKA"]
DIRECTIONS = "random directions"
_NULLED = {column: _COLUMNS[column] for column in ("kernel drift", "alignment", "CKA", "Jacobian drift",
                                                   "linearisation error")}  # fmt: skip


@summary_of_blocks
def summary(result: Result) -> Iterator[Block]:
    """Four tables: each method after training, its nulls, its checkpoints, and the methods against each other."""
    for table in (_methods, _nulls, _checkpoints, _pairs):
        header, rows = table(result)
        if rows:
            yield header, rows
    yield _notes(result)


def is_lazy(metric: Metric) -> str:
    """Whether a drift is below `LAZY`: yes, no, or open if its interval contains `LAZY`.

    >>> is_lazy(Metric("relative_jacobian_drift", 0.3, 0.2, 0.4, "", "trained", "full", ""))
    'no'
    """
    low, high = (metric.value if end is None or math.isnan(end) else end for end in (metric.low, metric.high))
    return "yes" if high < LAZY else "no" if low > LAZY else "open"


def _methods(result: Result) -> tuple[list[str], list[list[str]]]:
    rows = []
    for text in _texts(result):
        found = {name: result.metric(name, stage=STAGES[1], left=text) for name in _COLUMNS.values()}
        verdicts = [is_lazy(found[name]) for name in ("relative_jacobian_drift", "linearisation_error")]
        scores = [number(result.metric("score", stage=stage, left=text).value) for stage in STAGES]
        cells = {column: metric_cell(found[name]) for column, name in _COLUMNS.items()}
        rows.append([text, *_beside(cells, _from_start(result, text, found[_CKA])), " to ".join(scores), *verdicts])
    header = [f"{result.dataset['name']}, trained", *_beside(dict(zip(_COLUMNS, _COLUMNS)), DIRECTIONS),
              result.dataset["metric"], "features fixed", "linear"]  # fmt: skip
    return header, rows


def _nulls(result: Result) -> tuple[list[str], list[list[str]]]:
    rows = []
    for text in _texts(result):
        names = [f"null_{name}" for name in _NULLED.values()]
        for right in dict.fromkeys(m.right for m in result.metrics if m.left == text and m.name in names):
            found = [result.find(name, stage=STAGES[1], left=text, right=right) for name in names]
            cells = {column: metric_cell(m) if m else "" for column, m in zip(_NULLED, found, strict=True)}
            cka = found[list(_NULLED).index("CKA")]
            rows.append([f"{text}, {right}", *_beside(cells, _from_start(result, text, cka) if cka else "")])
    return ["null models, trained", *_beside(dict(zip(_NULLED, _NULLED)), DIRECTIONS)], rows


def _checkpoints(result: Result) -> tuple[list[str], list[list[str]]]:
    table: dict[tuple[str, int], dict[str, Any]] = {}
    for row in result.tables["checkpoints"]:
        table.setdefault((row["method"], row["step"]), {})[row["quantity"]] = row["value"]
    names = {**_COLUMNS, "trace ratio": "kernel_trace_ratio", "same class": "linearised_agreement",
             result.dataset["metric"]: "score"}  # fmt: skip
    rows = []
    for (text, step), found in table.items():
        cells = {column: number(found.get(name)) for column, name in names.items()}
        rows.append([f"{text}, step {step}", *_beside(cells, _from_start(result, text, found.get(_CKA)))])
    return ["along training, means", *_beside(dict(zip(names, names)), DIRECTIONS)], rows


def _pairs(result: Result) -> tuple[list[str], list[list[str]]]:
    rows = []
    pairs = dict.fromkeys((row["left"], row["right"]) for row in result.tables["pairs"])
    for left, right in pairs:
        for stage in STAGES:
            for null in (False, True):
                name, other = ("null_", f"{right}, {PERMUTED}") if null else ("", right)
                found = {m: result.metric(f"{name}{m}", stage=stage, left=left, right=other) for m in PAIRS}
                m = directions(result, f"{stage}.{left}.seed{result.seed}", found["cka"])
                cells = {column: metric_cell(metric) for column, metric in found.items()}
                rows.append([f"{left} and {other}, {stage}", *_beside(cells, m)])
    return ["kernels of two methods", *_beside(dict(zip(PAIRS, PAIRS)), DIRECTIONS)], rows


def _from_start(result: Result, text: str, cka: Metric | float | None) -> str:
    """The number of random directions of a CKA with a method's kernel at the start."""
    return directions(result, f"{STAGES[0]}.{text}.seed{result.seed}", cka)


def _beside(cells: Mapping[str, str], directions: str) -> list[str]:
    """The cells of a row by column, with the number of random directions after the CKA."""
    return [text for column, cell in cells.items()
            for text in ((cell, directions) if column.lower() == "cka" else (cell,))]  # fmt: skip


def _notes(result: Result) -> str:
    seeds, examples = len(result.config["seeds"]), result.config["n_examples"]
    intervals = f"Student's over {seeds} seeds" if seeds > 1 else f"bootstrap over {examples} examples"
    return (
        f"Intervals: 95 %, {intervals}; Jacobians on {result.config['n_jacobians']} examples. Drifts are relative to "
        f"the initial norm. Yes: the whole interval is below {LAZY}; no: above; open: it contains {LAZY}. The error of "
        "the linearisation is relative to the outputs' change: 1 is the error of predicting no change."
    )


def _texts(result: Result) -> list[str]:
    return [row["method"] for row in result.tables["methods"]]
