"""A result of `analyses.linearized_prediction` as tables, for the terminal and for documents."""

import math

from analyses.linearized_prediction.measures import PREDICTORS
from analyses.records import Metric, Result, format_table, interval


def summary(result: Result, *, markdown: bool = False) -> str:
    """Scores; agreement and correlation of networks with their kernels' predictions; methods with each other."""
    sizes = [row["size"] for row in result.tables["sizes"]]
    found = {(m.name, m.left, m.right, m.stage): m for m in result.metrics}

    def cells(name: str, left: str, right: str = "", beside: str = "") -> list[str]:
        each = []
        for size in sizes:
            metric = found.get((name, left, right, f"n={size}"))
            other = found.get((beside, left, right, f"n={size}"))
            each.append(_cell(metric) + (f" ({other.value:.3f})" if metric and other else ""))
        return each

    def lefts(name: str) -> list[tuple[str, str]]:
        return list(dict.fromkeys((m.left, m.right) for m in result.metrics if m.name == name))

    head = [f"n = {size}" for size in sizes]
    blocks = [
        format_table(
            [f"{result.dataset['name']}, {result.dataset['metric']}", *head],
            [[left, *cells("score", left)] for left, _ in sorted(lefts("score"), key=_place)], markdown=markdown,
        ),
    ]  # fmt: skip
    titles = {
        "prediction_agreement": "network and predictor: agreement (of independent errors)",
        "logit_correlation": "network and predictor: correlation of logits (within classes)",
    }
    besides = ("independent_errors_agreement", "logit_correlation_within_classes")
    for (name, title), beside in zip(titles.items(), besides, strict=True):
        if pairs := lefts(name):
            rows = [[f"{left}, {right}", *cells(name, left, right, beside)] for left, right in pairs]
            blocks.append(format_table([title, *head], rows, markdown=markdown))
    rows = []
    for prefix in ("trained_", "kernel_", "flow_", "kernel_head_", "sign_kernel_"):
        for left, right in lefts(f"{prefix}agreement"):
            beside = f"{prefix}independent_errors_agreement"
            rows.append([f"{prefix.rstrip('_')}: {left}, {right}", *cells(f"{prefix}agreement", left, right, beside)])
    if rows:
        title = "between methods: agreement (of independent errors)"
        blocks.append(format_table([title, *head], rows, markdown=markdown))
    return "\n\n".join(blocks)


def _cell(metric: Metric | None) -> str:
    if metric is None or not math.isfinite(metric.value):
        return "-"
    return interval(metric.value, metric.low, metric.high)


def _place(pair: tuple[str, str]) -> int:
    kinds = ["trained", *PREDICTORS.values(), "null"]
    return kinds.index(pair[0].partition(":")[0])
