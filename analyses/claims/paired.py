"""Evidence from paired differences: of a number above a limit, and of the seeds of two settings."""

import math
from collections.abc import Sequence

import numpy as np

from analyses.claims.claim import Evidence, Outcome, Quantity, above, at_least
from analyses.core.intervals import IDENTITY, clipped, mean_interval, p_value
from analyses.core.scales import SCALES, limits

NO_DIFFERENCE = Quantity("no difference", 0.0)


def decided(found: Quantity, limit: float) -> Outcome:
    """Undecided without an interval; else whether the whole interval is above a limit, or, below 0, at least at it."""
    if not found.has_interval:
        return Outcome.OPEN
    return at_least(found, limit) if limit else above(found, NO_DIFFERENCE)


def paired(label: str, own: Sequence[float], other: Sequence[float], metric: str) -> Evidence:
    """Evidence on the mean over seeds of own - other, with Student's interval and the p-value of no difference."""
    difference = np.subtract(own, other)
    possible = limits(SCALES.get(metric, IDENTITY))
    value, low, high = clipped(mean_interval(difference.tolist()), *possible)
    low, high = (None if math.isnan(end) else end for end in (low, high))
    found = Quantity(label, value, low, high, possible)
    error = float(difference.std(ddof=1)) / math.sqrt(len(difference)) if len(difference) > 1 else math.nan
    p = None if math.isnan(error) else p_value(value, error, len(difference) - 1)
    return Evidence(found, decided(found, 0.0), NO_DIFFERENCE, p=p)
