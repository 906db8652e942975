"""Bootstrap intervals of metrics of kernels over their examples, for a single seed."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

import ntk
from analyses.core.intervals import IDENTITY, LEVEL, Interval, Scale, clipped
from ntk import UndefinedMetricError
from ntk.checks import normalised

Kernel = Float[Tensor, "n n"]
Counts = Float[Tensor, "B n"]
Values = Float[Tensor, "B"]

# A kernel counts as constant if centring leaves less than this share of its squared norm, which is rounding error.
_ROUNDING = 1e-10


def bootstrap_interval(
    metric: Callable[..., float],
    kernels: Sequence[Tensor],
    *,
    resamples: int,
    seed: int,
    scale: Scale = IDENTITY,
    level: float = LEVEL,
) -> Interval:
    """A metric of kernels over the same n examples, with its bootstrap interval over the examples.

    Each resample draws n examples with replacement and takes the same rows and columns of every kernel (Efron and
    Tibshirani 1993, ch. 8 and 13). An example drawn twice puts diagonal entries off the diagonal, about as many as the
    diagonal has; they shift all resampled values of a metric alike. The interval therefore takes the percentiles'
    distance from the bootstrap mean, and not the percentiles themselves, to either side of the value,

        value + (q_low - mean),  value + (q_high - mean),

    cut at the bounds of the metric's scale. It is for a single seed: of a few seeds, a bootstrap covers much less than
    it says, and `analyses.core.intervals.mean_interval` takes its place.

    Resamples on which the metric is undefined (as of a constant kernel) are left out. The value and its ends are NaN if
    the metric of the kernels themselves is undefined.

    Raises:
        ValueError: no kernel, kernels over different numbers of examples, or ``level`` outside (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1; got {level}")
    value, draws = resampled(metric, kernels, resamples=resamples, seed=seed)
    return drawn_interval(value, draws, scale, level)


def drawn_interval(value: float, draws: np.ndarray, scale: Scale, level: float = LEVEL) -> Interval:
    """The interval of :func:`bootstrap_interval` from the values of the resamples; draws that are NaN are left out."""
    draws = draws[np.isfinite(draws)]
    if not np.isfinite(value) or not draws.size:
        return Interval(value, math.nan, math.nan)
    tail = (1 - level) / 2
    low, high = np.quantile(draws, [tail, 1 - tail]) - draws.mean()
    return clipped(Interval(value, value + float(low), value + float(high)), scale.low, scale.high)


def resampled(
    metric: Callable[..., float], kernels: Sequence[Tensor], *, resamples: int, seed: int
) -> tuple[float, np.ndarray]:
    """A metric of kernels over the same n examples, and its value on each resample of them; NaN where undefined.

    Metrics in `RESAMPLED` are computed on all resamples at once.

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


# --- metrics on many resamples at once ---
#
# A resample takes rows and columns of a kernel K with repetition; example i is drawn w_i times, sum_i w_i = n. Sums
# over the resampled matrix are then sums over K itself,
#
#     <K, L>_w = sum_ij w_i w_j K_ij L_ij,      tr_w K = sum_i w_i K_ii,
#
# and the inner product of both after centring is <K, L>_w - (2 / n) sum_i w_i (K w)_i (L w)_i + (w K w)(w L w) / n^2.
# B resamples cost three products (B, n) x (n, n); one at a time they would need B copies of every kernel. Metrics that
# are not such sums, as those of spectra, are computed one resample at a time (`resampled`).


def alignment(counts: Counts, K: Kernel, L: Kernel) -> Values:
    """:func:`ntk.kernel_alignment` on each resample; NaN where a kernel is zero."""
    K, L = normalised(K)[0], normalised(L)[0]  # so that products of their entries do not overflow
    product, left, right = _inner(counts, K, L), _inner(counts, K, K), _inner(counts, L, L)
    return product / _positive(left * right, 0 * left).sqrt()


def cka(counts: Counts, K: Kernel, L: Kernel) -> Values:
    """:func:`ntk.cka` on each resample; NaN where a kernel is constant."""
    # Centring over all examples first reduces rounding errors; it does not change what is centred again below.
    K, L = (ntk.metrics.center(normalised(A)[0]) for A in (K, L))
    left, right = (_positive(_centred(counts, A, A), _ROUNDING * _inner(counts, A, A)) for A in (K, L))
    return _centred(counts, K, L) / (left * right).sqrt()


def trace(counts: Counts, K: Kernel) -> Values:
    """:func:`ntk.trace` on each resample."""
    return counts @ K.diagonal()


def trace_ratio(counts: Counts, K: Kernel, L: Kernel) -> Values:
    """:func:`ntk.trace_ratio` on each resample; NaN where tr L is zero."""
    below = trace(counts, L)
    return trace(counts, K) / torch.where(below != 0, below, torch.nan)


def matching_degree(counts: Counts, K: Kernel, L: Kernel) -> Values:
    """:func:`ntk.matching_degree` on each resample."""
    return trace_ratio(counts, K, L).sqrt()


RESAMPLED: Mapping[Callable[..., float], Callable[..., Tensor]] = {
    ntk.kernel_alignment: alignment,
    ntk.cka: cka,
    ntk.trace: trace,
    ntk.trace_ratio: trace_ratio,
    ntk.matching_degree: matching_degree,
}


def _inner(counts: Counts, K: Kernel, L: Kernel) -> Values:
    return ((counts @ (K * L)) * counts).sum(1)


def _centred(counts: Counts, K: Kernel, L: Kernel) -> Values:
    n = counts.shape[1]
    left, right = counts @ K, counts @ L
    means = (left * counts).sum(1) * (right * counts).sum(1) / n**2
    return _inner(counts, K, L) - 2 / n * (counts * left * right).sum(1) + means


def _positive(values: Values, least: Values) -> Values:
    return torch.where(values > least, values, torch.nan)
