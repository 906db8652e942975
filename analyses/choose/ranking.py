"""Predicted scores of candidates that were tried for different numbers of steps, with intervals and probabilities."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

Score = Callable[[Int[np.ndarray, " m"]], float]
"""The score of a run on the held-out rows of these indices."""


@dataclass(frozen=True)
class Predicted:
    """A candidate's predicted score.

    Attributes:
        value: The score that a run of the longest tried length is predicted to have.
        low: Lower end of its 95 % bootstrap interval.
        high: Upper end.
        near: Share of resamples in which it is at most one standard error of the best score below the best.
    """

    value: float
    low: float
    high: float
    near: float


def predicted_scores(
    rounds: Sequence[Mapping[str, Score]], m: int, *, resamples: int, seed: int = 0
) -> dict[str, Predicted]:
    """Predict the score of every candidate at the length of the last round.

    A candidate's prediction is its score in its last round, plus the mean gain of the candidates that went on, in each
    later round:

        s_c(r) + sum over later rounds k of mean over c' in round k of [s_c'(k) - s_c'(k - 1)].

    The rows are resampled with replacement, the same ones for all candidates and rounds, and everything is computed
    anew on each resample (Efron and Tibshirani 1993, ch. 13), the gains and the best candidate included. The rule of
    one standard error is that of Breiman et al. (1984, sec. 3.4.3). Scores that are undefined on a resample count as
    0, the value of a correlation for constant predictions.

    Args:
        rounds: For each round, the scores of the candidates in it; those of a later round are in all earlier ones.
        m: Number of held-out rows.
        resamples: Number of bootstrap resamples.
        seed: Seed of the resamples.
    """
    generator = np.random.default_rng(seed)
    draws = [np.arange(m), *(generator.integers(0, m, m) for _ in range(resamples))]
    values: list[dict[str, Float[np.ndarray, " draws"]]] = [
        {name: np.nan_to_num(np.array([score(rows) for rows in draws])) for name, score in each.items()}
        for each in rounds
    ]
    predictions = {name: own + _gains(values, k) for k, each in enumerate(values) for name, own in each.items()}
    table = np.stack(list(predictions.values()))  # (candidates, 1 + resamples); the first column is of all rows.
    leader = int(table[:, 0].argmax())
    error = float(table[leader, 1:].std(ddof=1)) if resamples > 1 else 0.0
    near = (table[:, 1:] >= table[:, 1:].max(axis=0) - error).mean(axis=1)
    low, high = np.quantile(table[:, 1:], [0.025, 0.975], axis=1)
    return {
        name: Predicted(float(row[0]), float(low[i]), float(high[i]), float(near[i]))
        for i, (name, row) in enumerate(zip(predictions, table))
    }


def _gains(values: Sequence[Mapping[str, np.ndarray]], k: int) -> np.ndarray | float:
    """The mean gains after round k of those that went on, summed over rounds."""
    gains = [
        np.mean([own - values[later - 1][name] for name, own in values[later].items()], axis=0)
        for later in range(k + 1, len(values))
    ]
    return np.sum(gains, axis=0) if gains else 0.0
