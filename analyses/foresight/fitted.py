"""Predictors that are fitted on other tasks: the mean rank there, and a ridge regression on predictors' ranks.

What is used for a task is fitted without it and without the tasks that share its texts.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from analyses.foresight.scores import Setting, ranked

RIDGE = 1.0
"""Ridge of the regression, whose tasks have weight 1 in all and whose ranks lie between -1/2 and 1/2."""


def centred_ranks(values: Sequence[float | None]) -> Float[np.ndarray, " k"]:
    """Ranks of k values, shifted and scaled so that they lie between -1/2 and 1/2."""
    return (ranked(values) - (len(values) + 1) / 2) / max(len(values) - 1, 1)


def others(settings: Sequence[Setting], task: str, texts_of: Callable[[str], str]) -> dict[str, list[int]]:
    """The places of the settings of each other task that shares no texts with a task."""
    found: dict[str, list[int]] = {}
    for place, (other, *_) in enumerate(settings):
        if texts_of(other) != texts_of(task):
            found.setdefault(other, []).append(place)
    return found


def mean_ranks(
    settings: Sequence[Setting], scores: Float[np.ndarray, "s k"], texts_of: Callable[[str], str]
) -> Float[np.ndarray, "s k"] | None:
    """For each setting, the mean over other tasks of the mean centred rank of a candidate's final score.

    None if a setting has no other task.
    """
    ranks = np.array([centred_ranks(row.tolist()) for row in scores])
    found = []
    for task, *_ in settings:
        known = others(settings, task, texts_of)
        if not known:
            return None
        found.append(np.mean([ranks[places].mean(axis=0) for places in known.values()], axis=0))
    return np.array(found)


def combination(
    settings: Sequence[Setting], values: Mapping[str, Sequence[Sequence[float | None]]],
    scores: Float[np.ndarray, "s k"], texts_of: Callable[[str], str],
) -> Float[np.ndarray, "s k"] | None:  # fmt: skip
    """For each setting, the ranks of the final scores that a ridge regression on the predictors' ranks predicts.

        w = argmin sum over other tasks of (mean over rows of (y - X w)^2) + RIDGE ||w||^2

    with a row for each candidate of each setting of the task, X its centred ranks by the predictors, and y its centred
    rank by the final score. None if a setting has no other task.

    Args:
        settings: The settings.
        values: By predictor, for each setting, the values of the candidates.
        scores: Final scores.
        texts_of: The task whose texts a task has.
    """
    X = np.array([[centred_ranks(row) for row in each] for each in values.values()]).transpose(1, 2, 0)  # (s, k, q)
    y = np.array([centred_ranks(row.tolist()) for row in scores])
    found = []
    for place, (task, *_) in enumerate(settings):
        known = others(settings, task, texts_of)
        if not known:
            return None
        gram, target = RIDGE * np.eye(X.shape[2]), np.zeros(X.shape[2])
        for places in known.values():
            A, b = X[places].reshape(-1, X.shape[2]), y[places].ravel()
            gram += A.T @ A / len(A)
            target += A.T @ b / len(A)
        found.append(X[place] @ np.linalg.solve(gram, target))
    return np.array(found)
