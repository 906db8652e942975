"""Bootstrap intervals are reproducible, contain the value, and have the stated coverage."""

import math

import numpy as np
import pytest
import torch

import ntk
from analyses.core.bootstrap import RESAMPLED, bootstrap_interval, drawn_interval, resampled
from analyses.core.intervals import IDENTITY, LOGIT


def kernels(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    J = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return J @ J.T, (J + noise) @ (J + noise).T


def test_reproducible_and_about_the_value():
    K1, K2 = kernels(20, 0)
    first = bootstrap_interval(ntk.cka, [K1, K2], resamples=50, seed=3)
    assert first == bootstrap_interval(ntk.cka, [K1, K2], resamples=50, seed=3)
    assert first != bootstrap_interval(ntk.cka, [K1, K2], resamples=50, seed=4)
    value, low, high = first
    assert value == ntk.cka(K1, K2)
    assert low < value < high


def test_identical_kernels_leave_no_doubt():
    K, _ = kernels(20, 0)
    assert bootstrap_interval(ntk.kernel_alignment, [K, 3 * K], resamples=20, seed=0) == pytest.approx((1, 1, 1))


def test_covers_the_population_value_about_as_often_as_it_says():
    # tr K / n estimates E |J|^2 = 3, whose plain bootstrap is a textbook case without the duplicates' shift.
    def mean_norm(K):
        return ntk.trace(K) / len(K)

    hits = 0
    for seed in range(200):
        _, low, high = bootstrap_interval(mean_norm, [kernels(40, seed)[0]], resamples=100, seed=0)
        hits += low <= 3 <= high
    # Binomial(200, 0.95) lies above 174 in all but 1 of 100,000; the percentile bootstrap at n = 40 loses 2-3 points.
    assert 174 <= hits <= 200


def test_undefined_resamples_are_left_out():
    K = torch.eye(2)
    value, low, high = bootstrap_interval(ntk.cka, [K, K], resamples=30, seed=0)
    assert (value, low, high) == pytest.approx((1, 1, 1))
    assert np.isnan(bootstrap_interval(lambda k: 1.0, [K], resamples=0, seed=0)[1])


def test_mistakes():
    with pytest.raises(ValueError, match="same examples"):
        bootstrap_interval(ntk.cka, [torch.eye(2), torch.eye(3)], resamples=1, seed=0)
    with pytest.raises(ValueError, match="level"):
        bootstrap_interval(ntk.trace, [torch.eye(2)], resamples=1, seed=0, level=1.5)


def test_an_undefined_metric_is_not_a_number_rather_than_a_crash():
    kernels = [torch.eye(4), torch.zeros(4, 4)]
    assert all(math.isnan(end) for end in bootstrap_interval(ntk.cka, kernels, resamples=3, seed=0))


def test_the_interval_has_the_quantiles_distances_from_the_resamples_mean():
    draws = [1.0, 1.5, 3.0, math.nan]
    shifted = np.quantile(draws[:3], [0.025, 0.975]) - np.mean(draws[:3])
    assert drawn_interval(2.0, np.array(draws), IDENTITY) == pytest.approx((2, *(2 + shifted)))


def test_an_interval_is_cut_at_the_bounds_of_its_scale():
    pair = kernels(5, 17)
    value, low, high = bootstrap_interval(ntk.cka, pair, resamples=200, seed=0)
    assert high > 1
    assert bootstrap_interval(ntk.cka, pair, resamples=200, seed=0, scale=LOGIT) == (value, low, 1)


@pytest.mark.parametrize("metric", RESAMPLED, ids=lambda metric: metric.__name__)
def test_all_resamples_at_once_are_each_by_itself(metric):
    # Centring must remove a large mean entry, as kernels of pre-trained models have.
    pair = [K + 100 for K in kernels(9, 1)]
    operands = pair[:1] if metric is ntk.trace else pair
    value, values = resampled(metric, operands, resamples=40, seed=5)
    slow_value, slow = resampled(lambda *ks: metric(*ks), operands, resamples=40, seed=5)
    assert value == slow_value
    # The sums of 81 products of about 1e4 lose their last three digits where centred ones are about 10.
    np.testing.assert_allclose(values, slow, rtol=1e-9)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
@pytest.mark.parametrize("metric", [ntk.kernel_alignment, ntk.cka])
def test_intervals_of_alignments_do_not_depend_on_the_scale(metric, scale):
    K1, K2 = kernels(20, 0)
    found = bootstrap_interval(metric, [scale * K1, K2 / scale], resamples=20, seed=0)
    assert found == pytest.approx(bootstrap_interval(metric, [K1, K2], resamples=20, seed=0), rel=1e-12)


def test_resamples_without_a_value_are_the_same_at_once():
    pair = [torch.eye(3, dtype=torch.float64), torch.diag(torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64))]
    for metric in (ntk.cka, ntk.kernel_alignment, ntk.trace_ratio):
        _, values = resampled(metric, pair, resamples=60, seed=0)
        _, slow = resampled(lambda *ks, metric=metric: metric(*ks), pair, resamples=60, seed=0)
        assert np.isnan(slow).any()
        np.testing.assert_allclose(values, slow, rtol=1e-9)
