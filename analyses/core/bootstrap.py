"""Intervals for metrics of kernels, by resampling the examples they were measured on, and seeds beside them."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from analyses.core.resampled_metrics import RESAMPLED
from ntk import UndefinedMetricError


def bootstrap_interval(
    metric: Callable[..., float],
    kernels: Sequence[Tensor],
    *,
    resamples: int,
    seed: int,
    level: float = 0.95,
) -> tuple[float, float, float]:
    """A metric of kernels over the same n examples, with its bootstrap interval: (value, low, high).

    Each resample draws n examples with replacement and takes the same rows and columns of every kernel (Efron and
    Tibshirani 1993, ch. 8 and 13). An example drawn twice puts diagonal entries off the diagonal, about as many as the
    diagonal has; they shift all resampled values of a metric alike. The interval therefore takes the percentiles'
    distance from the bootstrap mean, and not the percentiles themselves, to either side of the value:

        value + (q_low - mean),  value + (q_high - mean)

    Resamples on which the metric is undefined (a constant kernel, say) are left out; what is undefined
    altogether is NaN.

    Raises:
        ValueError: no kernel, kernels over different numbers of examples, or ``level`` outside (0, 1).
    """
    return seed_interval([resampled(metric, kernels, resamples=resamples, seed=seed)], seed=seed, level=level)


def seed_interval(
    each: Sequence[tuple[float, np.ndarray]], *, seed: int, level: float = 0.95
) -> tuple[float, float, float]:
    """The mean over S seeds of a metric, with an interval over seeds and examples: (value, low, high).

    A hierarchical bootstrap (Davison and Hinkley 1997, sec. 3.8): each resample draws S seeds with replacement, and of
    each drawn seed a resample of its examples. Student's interval over seeds would cover both as well, since seeds draw
    their own examples, but of three seeds it is 4.3 standard errors wide to either side and leaves a metric's range.
    Where examples make most of the variance this interval is too wide (they count within seeds and between them), by
    up to sqrt(2 - 1/S); where seeds make most of it, too narrow, by down to sqrt(1 - 1/S). Of one seed it is
    :func:`bootstrap_interval` and says nothing of others.

    Args:
        each: for each seed what :func:`resampled` returns, of equally many resamples.
        seed: of the draws of seeds.
        level: of the interval.

    Raises:
        ValueError: no seed, or ``level`` outside (0, 1).
    """
    if not each:
        raise ValueError("seed_interval takes at least one seed")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1; got {level}")
    value = float(np.mean([found for found, _ in each]))
    # Each seed's resamples are moved so that their mean is its value: what examples drawn twice shift is taken out.
    moved = [found + values - np.nanmean(values) if np.isfinite(values).any() else values for found, values in each]
    count, generator = len(each), np.random.default_rng(seed)
    places = np.arange(len(moved[0]))
    drawn = generator.integers(0, count, size=(count, len(places)))
    slots = [
        # A seed drawn twice takes part with two resamples.
        np.stack(moved)[drawn[slot], places if slot == 0 else generator.permutation(places)]
        for slot in range(count)
    ]
    means = np.mean(slots, axis=0)
    means = means[np.isfinite(means)]
    if not np.isfinite(value) or not means.size:
        return value, float("nan"), float("nan")
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail]) - means.mean()
    return value, value + float(low), value + float(high)


def resampled(
    metric: Callable[..., float], kernels: Sequence[Tensor], *, resamples: int, seed: int
) -> tuple[float, np.ndarray]:
    """A metric of kernels over the same n examples, and its value on each resample of them; NaN where undefined.

    Those of `analyses.core.resampled_metrics` are taken on all resamples at once.

    Raises:
        ValueError: no kernel, or kernels over different numbers of examples.
    """
    if not kernels or len({len(kernel) for kernel in kernels}) != 1:
        raise ValueError("bootstrap_interval takes kernels over the same examples")
    try:
        value = metric(*kernels)
    except UndefinedMetricError:
        return float("nan"), np.full(resamples, np.nan)
    generator = np.random.default_rng(seed)
    n = len(kernels[0])
    draws = generator.integers(0, n, size=(resamples, n))
    at_once = RESAMPLED.get(metric)
    if at_once is not None and all(kernel.ndim == 2 for kernel in kernels):
        counts = np.stack([np.bincount(rows, minlength=n) for rows in draws]) if resamples else np.zeros((0, n))
        return value, at_once(torch.from_numpy(counts).double(), *(kernel.double() for kernel in kernels)).numpy()
    values = np.full(resamples, np.nan)
    for place, rows in enumerate(torch.from_numpy(draws)):
        try:
            values[place] = metric(*(kernel[rows][:, rows] for kernel in kernels))
        except UndefinedMetricError:
            continue
    return value, values
