"""Metrics on many resamples of the examples at once, from how often each example was drawn.

A resample takes rows and columns of a kernel K again and again; example i is drawn w_i times, sum_i w_i = n. Sums over
the resampled matrix are then sums over K itself,

    <K, L>_w = sum_ij w_i w_j K_ij L_ij,      tr_w K = sum_i w_i K_ii,

and the inner product of both after centring is <K, L>_w - (2 / n) sum_i w_i (K w)_i (L w)_i + (w K w)(w L w) / n^2. B
resamples cost three products (B, n) x (n, n), where one at a time takes B copies of every kernel. Metrics that are no
such sums, as those of spectra, are taken one resample at a time (`analyses.core.bootstrap.resampled`).
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

import ntk

Kernel = Float[Tensor, "n n"]
Counts = Float[Tensor, "B n"]
Values = Float[Tensor, "B"]

# Of the uncentred norm's square: what is left of a constant kernel's centred one by rounding.
_ROUNDING = 1e-10


def alignment(counts: Counts, K: Kernel, L: Kernel) -> Values:
    """:func:`ntk.kernel_alignment` on each resample; NaN where a kernel is zero."""
    product, left, right = _inner(counts, K, L), _inner(counts, K, K), _inner(counts, L, L)
    return product / _positive(left * right, 0 * left).sqrt()


def cka(counts: Counts, K: Kernel, L: Kernel) -> Values:
    """:func:`ntk.cka` on each resample; NaN where a kernel is constant."""
    # Centred over all examples first, which resamples' own centring undoes, for the sake of rounding.
    K, L = ntk.metrics.center(K), ntk.metrics.center(L)
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
