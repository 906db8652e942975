"""Scores of predictors: rank correlation and regret in each setting, means over tasks, and a bootstrap over both."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata

from analyses.choose.predictors import rank_correlation
from analyses.core.intervals import Interval

Setting = tuple[str, int, int]
"""Task, number of rows, seed."""


def ranked(values: Sequence[float | None]) -> Float[np.ndarray, " k"]:
    """Ranks from 1 for the lowest, ties averaged; candidates without a value share the lowest rank.

    >>> ranked([0.3, None, 0.5, None])
    array([3. , 1.5, 4. , 1.5])
    """
    return rankdata([-math.inf if value is None else value for value in values])


def correlation(values: Sequence[float | None], scores: Sequence[float]) -> float:
    """Spearman's rank correlation of a predictor's values with final scores.

    A candidate without a value is ranked last. A predictor with one value for all says nothing: 0. NaN if all final
    scores are equal, or there are fewer than three candidates.
    """
    ranks, found = ranked(values), np.asarray(scores, dtype=float)
    if len(found) < 3 or np.ptp(found) == 0:
        return math.nan
    return 0.0 if np.ptp(ranks) == 0 else rank_correlation(ranks, found)


def regret(values: Sequence[float | None], scores: Sequence[float]) -> float:
    """The best final score less that of the candidate with the largest value, in points; ties are averaged."""
    ranks, found = ranked(values), np.asarray(scores, dtype=float)
    return 100 * float(found.max() - found[ranks == ranks.max()].mean())


class Draws:
    """Means over tasks, and their values on resamples of tasks and of seeds within tasks, the same for all measures.

    A task's value is the mean over its settings. A resample draws as many tasks as there are, with replacement, and for
    each task as many of its seeds as it has, with replacement; the settings of a drawn seed come with it (Davison and
    Hinkley 1997, sec. 3.8, strategy of both levels with replacement).
    """

    def __init__(self, settings: Sequence[Setting], resamples: int, seed: int = 0) -> None:
        """Draw the resamples of some settings."""
        self.settings = list(settings)
        self.tasks = list(dict.fromkeys(task for task, *_ in settings))
        places: dict[str, dict[int, list[int]]] = {task: defaultdict(list) for task in self.tasks}
        for place, (task, _, number) in enumerate(self.settings):
            places[task][number].append(place)
        generator = np.random.default_rng(seed)
        self._drawn: list[list[list[int]]] = []
        for _ in range(resamples):
            one = []
            for index in generator.integers(0, len(self.tasks), len(self.tasks)):
                seeds = list(places[self.tasks[index]].values())
                one.append([p for k in generator.integers(0, len(seeds), len(seeds)) for p in seeds[k]])
            self._drawn.append(one)

    def mean(self, values: Float[np.ndarray, " settings"]) -> float:
        """The mean over tasks of the mean over their settings; values that are not numbers are left out."""
        tasks = np.array([task for task, *_ in self.settings])
        return _mean([_mean(values[tasks == task]) for task in self.tasks])

    def resampled(self, values: Float[np.ndarray, " settings"]) -> Float[np.ndarray, " resamples"]:
        """The same on each resample."""
        return np.array([_mean([_mean(values[places]) for places in one]) for one in self._drawn])

    def interval(self, values: Float[np.ndarray, " settings"]) -> Interval:
        """The mean with the 95 % percentile interval of the resamples; ends are NaN with fewer than two tasks."""
        value = self.mean(values)
        draws = self.resampled(values)
        draws = draws[np.isfinite(draws)]
        if len(self.tasks) < 2 or not draws.size or not math.isfinite(value):
            return Interval(value, math.nan, math.nan)
        low, high = np.quantile(draws, [0.025, 0.975])
        return Interval(value, float(low), float(high))

    def p_value(self, values: Float[np.ndarray, " settings"]) -> float:
        """Two-sided p-value that the mean is zero: twice the smaller share of resamples on either side of zero.

        It counts the value itself as one more resample, so that it is never zero; NaN with fewer than two tasks.
        """
        draws = self.resampled(values)
        draws = draws[np.isfinite(draws)]
        if len(self.tasks) < 2 or not draws.size:
            return math.nan
        sides = min((draws <= 0).sum(), (draws >= 0).sum())
        return min(1.0, 2 * (1 + float(sides)) / (1 + len(draws)))


def ceiling(scores: Mapping[Setting, Sequence[float]]) -> Interval:
    """Rank correlation between the final scores of two seeds of a task and number of rows, over all pairs of seeds.

    The mean is over tasks, each the mean over its pairs; the ends are the lowest and the highest task. NaN if no task
    has two seeds.
    """
    found: dict[str, list[float]] = defaultdict(list)
    for (task, rows, seed), one in scores.items():
        for (other_task, other_rows, other_seed), other in scores.items():
            if (task, rows) == (other_task, other_rows) and seed < other_seed:
                found[task].append(correlation(one, other))
    means = [m for each in found.values() if math.isfinite(m := _mean(each))]
    if not means:
        return Interval(math.nan, math.nan, math.nan)
    return Interval(_mean(means), min(means), max(means))


def _mean(values: Sequence[float] | np.ndarray) -> float:
    """The mean of the values that are numbers; NaN if there is none."""
    known = np.asarray(values, dtype=float)
    known = known[np.isfinite(known)]
    return float(known.mean()) if known.size else math.nan
