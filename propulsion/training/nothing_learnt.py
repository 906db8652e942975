"""Signs that a run has learnt nothing: one prediction for all rows, or a loss that has not fallen; and what to do."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from propulsion.data.tasks import Task

_FEWEST = 8  # Losses below which a fall and noise cannot be told apart.
_SPREAD = 0.02  # Of a regression's predictions beside that of the labels, below which they count as one number.


def signs(task: Task, predictions: Sequence[Any], labels: Sequence[Any], losses: Sequence[float]) -> list[str]:
    """Say in a sentence each what shows that nothing was learnt, and the remedy last; empty where nothing shows it.

    Args:
        task: What was trained.
        predictions: One for every validation row.
        labels: What they should have been; where these are all the same too, one prediction is no sign.
        losses: Of training, in order: of every step, or means over as many steps each.
    """
    found = [text for text in (_one_prediction(task, predictions, labels), _no_fall(losses)) if text]
    return [*found, _remedy(losses)] if found else []


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
    """The different values of rows, or of the parts of rows, such as tags."""
    flat = [part for item in items for part in (item if isinstance(item, list | tuple) else [item])]
    return {part if isinstance(part, str) else repr(part) if isinstance(part, dict) else int(part) for part in flat}


def _no_fall(losses: Sequence[float]) -> str:
    if len(losses) < _FEWEST:
        return ""
    first, last, noise = _ends(losses)
    if first - last > 2 * noise:
        return ""
    return f"the training loss has not fallen: {first:.3g} at first, {last:.3g} in the last quarter of the run"


def _ends(losses: Sequence[float]) -> tuple[float, float, float]:
    """Mean of the first losses and of the last quarter, and the standard error of their difference.

    Few are the first ones, as a run may have learnt the most of it in a quarter of its steps.
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
