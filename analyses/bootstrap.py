"""Intervals for metrics of kernels, by resampling the examples they were measured on."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

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
    if not kernels or len({len(kernel) for kernel in kernels}) != 1:
        raise ValueError("bootstrap_interval takes kernels over the same examples")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1; got {level}")
    try:
        value = metric(*kernels)
    except UndefinedMetricError:
        return float("nan"), float("nan"), float("nan")
    generator = np.random.default_rng(seed)
    n = len(kernels[0])
    values = []
    for _ in range(resamples):
        rows = torch.from_numpy(generator.integers(0, n, size=n))
        try:
            values.append(metric(*(kernel[rows][:, rows] for kernel in kernels)))
        except UndefinedMetricError:
            continue
    if not values:
        return value, float("nan"), float("nan")
    tail = (1 - level) / 2
    low, high = np.quantile(values, [tail, 1 - tail]) - np.mean(values)
    return value, value + float(low), value + float(high)
