"""Intervals and tests of means: over seeds, over seeds and the rows they share, and corrected for many comparisons.

Seeds are independent repetitions. Seeds and rows are crossed if every seed is scored on the same rows. All intervals
are of arithmetic means, two-sided, and at a level of 95 % unless another is given.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import special

Values = Sequence[float] | Float[np.ndarray, " n"]
LEVEL = 0.95


class Interval(NamedTuple):
    """A mean with the ends of its interval; the ends are NaN where the variance cannot be estimated."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Scale:
    """A scale on which a bounded quantity is unbounded.

    Attributes:
        low: Smallest possible value of the quantity.
        high: Largest possible value.
        to: From the quantity to the scale, increasing.
        back: The inverse of `to`.
        slope: Derivative of `to`.
    """

    low: float
    high: float
    to: Callable[[float], float]
    back: Callable[[float], float]
    slope: Callable[[float], float]


IDENTITY = Scale(-math.inf, math.inf, lambda x: x, lambda y: y, lambda x: 1.0)
"""For differences, which may have either sign."""
LOG = Scale(0.0, math.inf, np.log, np.exp, lambda x: 1 / x)
"""For distances, ratios and other quantities that are not negative."""
LOGIT = Scale(0.0, 1.0, special.logit, special.expit, lambda x: 1 / (x * (1 - x)))
"""For shares, accuracies, and the CKA of kernels."""
FISHER = Scale(-1.0, 1.0, np.arctanh, np.tanh, lambda x: 1 / (1 - x * x))
"""For correlations (Fisher 1915)."""
_ROUNDING = 1e-9
"""How far rounding may carry a value beyond its bounds."""


def between(low: float, high: float) -> Scale:
    """The logit of (x - low) / (high - low), for quantities with two bounds, as the effective rank of a kernel."""
    width = high - low
    return Scale(
        low, high, lambda x: special.logit((x - low) / width), lambda y: low + width * special.expit(y),
        lambda x: width / ((x - low) * (high - x)),
    )  # fmt: skip


def mean_interval(values: Values, scale: Scale = IDENTITY, level: float = LEVEL) -> Interval:
    """Mean of n independent values with Student's interval, whose ends are computed on a scale.

    With standard error e = s / sqrt(n), t the quantile of Student's distribution with n - 1 degrees of freedom, and g
    the scale,

        g^-1(g(mean) -+ t e g'(mean)),

    which never leaves the possible values. On the logit scale it is the interval of Korn and Graubard (1998) for
    proportions, on the log scale that of Meeker and Escobar (1998, sec. 7.3) for positive quantities. It is an interval
    of the mean, not of the mean of g, so that no value at a bound makes it infinite. Its coverage is close to the
    level up to a relative scatter of one half, and falls to 88 to 92 % for a log-normal quantity with a relative
    scatter of 1.3, at 3 to 10 values.

    One value has no interval: both ends are NaN. If all values are equal, the interval is that value alone; the values
    then show no scatter, which a few of them do not exclude. A value that is not finite leaves everything NaN.

    Raises:
        ValueError: No value, a value outside the scale's bounds, or ``level`` outside (0, 1).
    """
    sample = np.asarray(values, dtype=float)
    if not len(sample):
        raise ValueError("an interval needs at least one value")
    mean = _mean_within(sample, scale)
    error = float(sample.std(ddof=1)) / math.sqrt(len(sample)) if len(sample) > 1 else math.nan
    return _interval(mean, error, len(sample) - 1, scale, level)


def on_scale(value: float, low: float, high: float, scale: Scale) -> Interval:
    """An interval [low, high] about a value, given on the identity scale, with its ends computed on another scale.

    The distance d of an end from the value becomes g^-1(g(value) + d g'(value)), as in :func:`mean_interval`: what that
    gives on a scale follows from what it gives on the identity scale. A value at a bound has itself as its interval.

    Raises:
        ValueError: The value is outside the scale's bounds.
    """
    if not all(map(math.isfinite, (value, low, high))):
        return Interval(value, math.nan, math.nan)
    value = _mean_within(np.array([value]), scale)
    if value in (scale.low, scale.high) or low == high:
        return Interval(value, value, value)
    ends = (scale.back(scale.to(value) + (end - value) * scale.slope(value)) for end in (low, high))
    return Interval(value, *map(float, ends))


def clipped(interval: Interval, low: float, high: float) -> Interval:
    """An interval without what lies outside [low, high], where its quantity never is; its coverage is the same."""
    ends = (min(max(end, low), high) for end in interval[1:])
    return Interval(interval.value, *ends)


def crossed_interval(values: Float[np.ndarray, "S R"], scale: Scale = IDENTITY, level: float = LEVEL) -> Interval:
    """Mean over S seeds and R rows that all seeds share, with an interval for other seeds and other rows.

    Seeds, rows and their interaction are random effects, y_sr = m + a_s + b_r + e_sr. With the variance A of the seeds'
    means over rows, and the variance B of the rows' means over seeds, the squared standard error and Satterthwaite's
    (1946) degrees of freedom are

        e^2 = A / S + B / R,        e^4 / ((A / S)^2 / (S - 1) + (B / R)^2 / (R - 1)).

    A and B both contain the interaction's variance, divided by R and by S, so that e^2 counts it twice. The interval
    is therefore wider than necessary where the interaction dominates, and never too narrow: :func:`variance_components`
    says how much each effect contributes. The ends are computed on `scale` as those of :func:`mean_interval`.

    One seed or one row has no interval: both ends are NaN. If all values are equal, the interval is that value alone.

    Raises:
        ValueError: No value, a mean outside the scale's bounds, or ``level`` outside (0, 1).
    """
    value, error, degrees = crossed_error(values)
    return _interval(_mean_within(np.array([value]), scale), error, degrees, scale, level)


def crossed_error(values: Float[np.ndarray, "S R"]) -> tuple[float, float, float]:
    """Mean, standard error and degrees of freedom of :func:`crossed_interval`."""
    if not values.size:
        raise ValueError("an interval needs at least one seed and one row")
    S, R = values.shape
    mean = float(values.mean())
    if min(S, R) < 2:
        return mean, math.nan, math.nan
    seeds, rows = float(values.mean(1).var(ddof=1)) / S, float(values.mean(0).var(ddof=1)) / R
    below = seeds**2 / (S - 1) + rows**2 / (R - 1)
    return mean, math.sqrt(seeds + rows), (seeds + rows) ** 2 / below if below > 0 else math.inf


class Components(NamedTuple):
    """Variances of the random effects of seeds, rows and their interaction."""

    seeds: float
    rows: float
    interaction: float


def variance_components(values: Float[np.ndarray, "S R"]) -> Components:
    """Estimates of the variance components of y_sr = m + a_s + b_r + e_sr, by the analysis of variance.

    With the mean squares MS of a two-way table, (MS_seeds - MS_e) / R, (MS_rows - MS_e) / S and MS_e (Searle, Casella
    and McCulloch 1992, sec. 4.3), each not below zero. The interaction includes whatever else differs in one cell.

    Raises:
        ValueError: Fewer than two seeds or two rows.
    """
    S, R = values.shape
    if min(S, R) < 2:
        raise ValueError(f"variance components need two seeds and two rows at least; got {values.shape}")
    seeds, rows = values.mean(1, keepdims=True), values.mean(0, keepdims=True)
    left = values - seeds - rows + values.mean()
    residual = float((left**2).sum()) / ((S - 1) * (R - 1))
    of_seeds, of_rows = R * float(seeds.var(ddof=1)), S * float(rows.var(ddof=1))
    return Components(max(0.0, (of_seeds - residual) / R), max(0.0, (of_rows - residual) / S), residual)


def row_values(
    score: Callable[[Int[np.ndarray, " k"]], float], n: int, *, groups: int = 1000
) -> Float[np.ndarray, " g"]:
    """A score's value for each of its n rows: numbers whose mean is the score, and whose scatter is that of the rows.

    They are the jackknife's pseudo-values n T - (n - 1) T_(r), with T_(r) the score without row r (Tukey 1958; Efron
    and Tibshirani 1993, ch. 11), shifted so that their mean is T. For a mean over rows they are the rows' own values.
    For a score that is not a mean, as a correlation, they take the place of rows in :func:`crossed_interval` (Dorfman,
    Berbaum and Metz 1992). More than `groups` rows are left out in that many groups, which then count as the rows; the
    groups are drawn at random, and are the same in every call. Cost: the smaller of n and `groups` evaluations.

    Args:
        score: The score of the rows with the given indices.
        n: Number of rows.
        groups: Largest number of evaluations.
    """
    order = np.random.default_rng(0).permutation(n) if n > groups else np.arange(n)
    parts = np.array_split(order, min(n, groups))
    kept = np.ones(n, dtype=bool)
    without = []
    for part in parts:
        kept[part] = False
        without.append(score(np.flatnonzero(kept)) if kept.any() else math.nan)
        kept[part] = True
    left_out = np.array(without)
    return score(np.arange(n)) - (len(parts) - 1) * (left_out - left_out.mean())


def p_value(estimate: float, error: float, degrees: float, limit: float = 0.0) -> float:
    """Two-sided p-value of Student's test that a mean, with its standard error, equals a limit.

    It is below 1 - level exactly where the interval of that level, on the identity scale, does not contain the limit.
    NaN without a standard error. With an error of 0 it is 0, or 1 for an estimate at the limit.
    """
    if error == 0:
        return float(estimate == limit)
    return float(2 * special.stdtr(degrees, -abs(estimate - limit) / error))


def holm(p: Values) -> list[float]:
    """Adjusted p-values of a family of m tests (Holm 1979): the chance of any false rejection is at most that level.

    With the p-values in ascending order, the i-th is max over j <= i of (m - j + 1) p_(j), at most 1; the result is in
    the order of the arguments. All tests whose adjusted value is at most 5 % may be rejected together. A test without a
    p-value (NaN) rejects nothing, but counts as one of the m.
    """
    values = np.asarray(p, dtype=float)
    order = np.argsort(values)  # NaN comes last.
    steps = np.arange(len(values), 0, -1)
    adjusted = np.empty(len(values))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps * values[order]), 1)
    return adjusted.tolist()


def _mean_within(values: np.ndarray, scale: Scale) -> float:
    """The mean of values that must lie within the bounds of a scale, up to rounding."""
    beyond = (values < scale.low - _ROUNDING) | (values > scale.high + _ROUNDING)
    if beyond.any():
        raise ValueError(f"expected values from {scale.low:g} to {scale.high:g}; got {values[beyond][0]}")
    return min(max(float(values.mean()), scale.low), scale.high) if np.isfinite(values).all() else math.nan


def _interval(mean: float, error: float, degrees: float, scale: Scale, level: float) -> Interval:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1; got {level}")
    if not (math.isfinite(mean) and math.isfinite(error)):
        return Interval(mean, math.nan, math.nan)
    half = float(special.stdtrit(degrees, (1 + level) / 2)) * error if error else 0.0
    return on_scale(mean, mean - half, mean + half, scale)
