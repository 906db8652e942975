"""Intervals over the seeds of repeated runs."""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats


def over_seeds(seeds: Sequence[int], n_examples: int) -> str:
    """What a bootstrap over seeds and their examples is over, in words."""
    each = f"{len(seeds)} seeds and, in each, " if len(seeds) > 1 else ""
    return f"bootstrap over {each}{n_examples} examples"


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean of independent runs with Student's interval: (mean, low, high); the ends are NaN for a single run."""
    sample = np.asarray(values, dtype=float)
    mean = float(sample.mean())
    if len(sample) < 2:
        return mean, math.nan, math.nan
    half = stats.t.ppf((1 + level) / 2, len(sample) - 1) * sample.std(ddof=1) / math.sqrt(len(sample))
    return mean, mean - float(half), mean + float(half)
