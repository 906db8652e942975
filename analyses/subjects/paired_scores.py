"""Scores of several methods on the same seeds and rows, their paired differences, and Holm's corrected decisions."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from analyses.core.intervals import clipped, crossed_error, crossed_interval, holm, p_value, row_values
from analyses.core.scales import limits, scale_of
from analyses.records import Metric
from propulsion.data.metrics import METRICS, accuracy
from propulsion.data.tasks import get_task

LEVEL_OF_ERRORS = 0.05
"""Chance that Holm's correction allows for any false difference among a family of comparisons."""
BEST_ANSWER = "best single answer"
"""Names the answer that scores best if it is given for every row; of correlations it scores 0."""

Predictions = Mapping[str, Shaped[np.ndarray, "S n"]]


def score_rows(
    metric: str, predictions: Shaped[np.ndarray, "S n"], labels: Shaped[np.ndarray, " n"]
) -> Float[np.ndarray, "S R"]:
    """A score's value for each row, or group of rows, in every seed (:func:`analyses.core.intervals.row_values`).

    The mean over a seed's values is its score. An accuracy's values are whether each row is right. A seed whose score
    is undefined, as a correlation of constant predictions is, has values that are not numbers.
    """
    if METRICS[metric] is accuracy:
        return (predictions == labels).astype(float)
    score = METRICS[metric]
    return np.stack([row_values(lambda kept, p=p: score(p[kept], labels[kept]), len(labels)) for p in predictions])


def best_answer_rows(metric: str, rows: Float[np.ndarray, "S R"], labels: np.ndarray) -> Float[np.ndarray, "S R"]:
    """The values of `score_rows` of the best single answer, in the shape of those of a method."""
    if METRICS[metric] is not accuracy:
        return np.zeros_like(rows)
    values, counts = np.unique(labels, return_counts=True)
    return np.broadcast_to((labels == values[counts.argmax()]).astype(float), rows.shape)


def pairs_of(methods: Sequence[str], reference: str) -> list[tuple[str, str]]:
    """The compared pairs (left, right) of methods: every method with the reference and with the best single answer, and
    every kind of Propulsion with every other adapter."""
    own = [m for m in methods if m.startswith("propulsion")]
    rivals = [m for m in methods if m not in (*own, reference, "head")]
    return [
        *((m, reference) for m in methods if m != reference and reference in methods),
        *((m, BEST_ANSWER) for m in methods),
        *((m, rival) for m in own for rival in rivals),
    ]


def score_metrics(
    task: str, predictions: Predictions, labels: np.ndarray, reference: str
) -> tuple[list[Metric], list[dict[str, Any]]]:
    """The scores of all methods and their paired differences, with 95 % intervals over seeds and rows.

    A score's interval is computed on its scale. A difference is taken within a seed and a row, and its interval is cut
    at the greatest difference that the score allows. Differences with one right side are a family: their p-values, of
    the test that there is no difference, are corrected together by Holm's method, for each metric.

    Args:
        task: Name of the task.
        predictions: By method, ``(S, n)``: the predictions of every seed on the n rows that all seeds share.
        labels: ``(n,)``.
        reference: The method that all others are compared with.

    Returns:
        The metrics, and one row for each difference: task, metric, left, right, value, low, high, error (its standard
        error), degrees (of freedom), p and p_holm.
    """
    metrics, comparisons = [], []
    for name in get_task(task).metrics:
        scale = scale_of(name)
        rows = {text: score_rows(name, found, labels) for text, found in predictions.items()}
        metrics += [Metric(name, *crossed_interval(r, scale), "", task, text, "") for text, r in rows.items()]
        rows[BEST_ANSWER] = best_answer_rows(name, next(iter(rows.values())), labels)
        found = [_difference(task, name, *pair, rows) for pair in pairs_of(list(predictions), reference)]
        metrics += [
            Metric(name, c["value"], c["low"], c["high"], "", f"{task}, difference", c["left"], c["right"])
            for c in found
        ]
        for right in dict.fromkeys(c["right"] for c in found):
            family = [c for c in found if c["right"] == right]
            for c, adjusted in zip(family, holm([c["p"] for c in family]), strict=True):
                c["p_holm"] = adjusted
        comparisons += found
    return metrics, comparisons


def _difference(task: str, metric: str, left: str, right: str, rows: Mapping[str, np.ndarray]) -> dict[str, Any]:
    difference = rows[left] - rows[right]
    value, low, high = clipped(crossed_interval(difference), *limits(scale_of(metric)))
    _, error, degrees = crossed_error(difference)
    return {"task": task, "metric": metric, "left": left, "right": right, "value": value, "low": low, "high": high,
            "error": error, "degrees": degrees, "p": p_value(value, error, degrees)}  # fmt: skip


def corrected(comparison: Mapping[str, Any]) -> str:
    """The decision on a difference after Holm's correction, with its p-value: lower, higher, or open."""
    p, value = comparison["p_holm"], comparison["value"]
    if p is None or math.isnan(p):
        return "open"
    sign = "lower" if value < 0 else "higher"
    return f"{sign if p <= LEVEL_OF_ERRORS else 'open'}, p = {p:.2g}"
