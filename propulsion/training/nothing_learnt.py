"""Signs that a run has learnt nothing: one prediction for all rows, or a loss that has not fallen; and what to try."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from propulsion.data.tasks import Task

_FEWEST = 8  # With fewer losses, a fall cannot be told from noise.
_SPREAD = 0.02  # A regression's predictions count as one number below this share of the labels' standard deviation.


def signs(task: Task, predictions: Sequence[Any], labels: Sequence[Any], losses: Sequence[float]) -> list[str]:
    """Return the signs that nothing was learnt, one sentence each, with the remedy last; empty if there are none.

    Predictions and labels have one entry for every validation row; if all labels are the same, one prediction for all
    rows is no sign. The training losses, in order, are of every step, or are means over equal numbers of steps.
    """
    findings = [text for text in (_one_prediction(task, predictions, labels), _no_fall(losses)) if text]
    return [*findings, _remedy(losses)] if findings else []


def _one_prediction(task: Task, predictions: Sequence[Any], labels: Sequence[Any]) -> str:
    if task.is_regression:
        spread, wanted = float(np.std(predictions)), float(np.std(labels))
        if spread >= _SPREAD * wanted:
            return ""
        return f"the predictions are nearly one number: {np.mean(predictions):.3g}, give or take {spread:.2g}"
    made, right = _values(predictions), _values(labels)
    if len(made) != 1 or len(right) < 2:
        return ""
    value = next(iter(made))
    if isinstance(value, str):
        return f"every prediction is {value!r}"
    name = task.label_names[value] if value < len(task.label_names) else ""
    return f"every row is predicted to be of class {value}{f' ({name})' * bool(name)}"


def _values(items: Sequence[Any]) -> set[Any]:
    """The distinct values of all rows, where a row that is a list, such as tags, counts by its items."""
    flat = [value for item in items for value in (item if isinstance(item, list | tuple) else [item])]
    return {v if isinstance(v, str) else repr(v) if isinstance(v, dict) else int(v) for v in flat}


def _no_fall(losses: Sequence[float]) -> str:
    if len(losses) < _FEWEST:
        return ""
    first, last, noise = _ends(losses)
    if first - last > 2 * noise:
        return ""
    return f"the training loss has not fallen: {first:.3g} at first, {last:.3g} in the last quarter of the run"


def _ends(losses: Sequence[float]) -> tuple[float, float, float]:
    """Mean of the first losses and of the last quarter, and the standard error of their difference.

    The first losses are few, since most of the learning may happen in the first quarter of the steps.
    """
    first, last = np.asarray(losses[: max(3, len(losses) // 20)]), np.asarray(losses[-max(3, len(losses) // 4) :])
    noise = np.sqrt(first.var(ddof=1) / len(first) + last.var(ddof=1) / len(last))
    return float(first.mean()), float(last.mean()), float(noise)


def _remedy(losses: Sequence[float]) -> str:
    if len(losses) >= _FEWEST:
        first, last, noise = _ends(losses)
        if last - first > 2 * noise:
            return "the loss has risen: try a lower learning rate, a third of this one, or a longer warm-up"
    return (
        "train longer, or with another learning rate: auto where one was given, else three times the one printed, "
        "and a third of it"
    )
