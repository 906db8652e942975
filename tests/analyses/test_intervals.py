"""Intervals cover what they say at 3, 5 and 10 seeds, stay within the possible values, or have no ends."""

import math

import numpy as np
import pytest
from scipy import special, stats

from analyses.core.intervals import (
    FISHER,
    IDENTITY,
    LOG,
    LOGIT,
    between,
    clipped,
    crossed_error,
    crossed_interval,
    holm,
    mean_interval,
    on_scale,
    p_value,
    row_values,
    variance_components,
)
from analyses.core.scales import bounded_mean

SEEDS = (3, 5, 10)
STATED = 0.95
LEAST = 0.93
"""Smallest coverage that the plan of the claims accepts where 95 % is stated."""


def tolerance(coverage: float, draws: int) -> float:
    """How far the share of `draws` may be from a coverage: 4 binomial standard deviations, passed once in 16,000."""
    return 4 * math.sqrt(coverage * (1 - coverage) / draws)


def coverage(intervals, truth: float) -> float:
    found = np.array(list(intervals))
    assert np.isfinite(found).all()
    return float(((found[:, 1] <= truth) & (truth <= found[:, 2])).mean())


# --- means over seeds -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", SEEDS)
def test_of_normal_values_exactly_the_stated_share_of_intervals_contains_the_truth(seeds):
    values = np.random.default_rng(seeds).normal(2, 5, (5000, seeds))
    assert coverage(map(mean_interval, values), 2) == pytest.approx(STATED, abs=tolerance(STATED, 5000))


DRAWS = {
    # name: (scale, draws from a generator and a shape, the mean)
    "log-normal, relative scatter .25": (LOG, lambda g, n: np.exp(0.25 * g.normal(size=n)), math.exp(0.25**2 / 2)),
    "log-normal, relative scatter .53": (LOG, lambda g, n: np.exp(0.5 * g.normal(size=n)), math.exp(0.5**2 / 2)),
    "beta, a CKA about .93": (LOGIT, lambda g, n: g.beta(40, 3, n), 40 / 43),
    "beta, a share about .67": (LOGIT, lambda g, n: g.beta(4, 2, n), 4 / 6),
    "beta, half of it above .9": (LOGIT, lambda g, n: g.beta(2, 0.5, n), 0.8),
    "beta, a correlation about .5": (FISHER, lambda g, n: 2 * g.beta(6, 2, n) - 1, 0.5),
}


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("name", DRAWS)
def test_skewed_and_bounded_values_are_covered_and_never_left(name, seeds):
    scale, draw, truth = DRAWS[name]
    found = np.array([mean_interval(sample, scale) for sample in draw(np.random.default_rng(seeds), (4000, seeds))])
    assert coverage(found, truth) >= LEAST - tolerance(LEAST, 4000)
    assert scale.low <= found[:, 1].min()
    assert found[:, 2].max() <= scale.high
    assert (found[:, 1] <= found[:, 0]).all()
    assert (found[:, 0] <= found[:, 2]).all()


def test_on_the_identity_scale_bounded_values_are_left_and_covered_less():
    values = np.random.default_rng(0).beta(2, 0.5, (4000, 3))
    found = [mean_interval(sample) for sample in values]
    assert coverage(found, 0.8) < LEAST - tolerance(LEAST, 4000)
    assert max(high for _, _, high in found) > 1


def bootstrap_over_seeds(values: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """The percentile bootstrap over seeds, which analyses used before: mean, low, high."""
    drawn = np.random.default_rng(seed).integers(0, len(values), (200, len(values)))
    return float(values.mean()), *np.quantile(values[drawn].mean(1), [0.025, 0.975]).tolist()


def test_a_bootstrap_over_three_seeds_covers_three_quarters_where_it_says_95_percent():
    # One resample in 27 is three times the lowest seed, more than the 2.5 % that a tail has. The interval is therefore
    # that from the lowest to the highest seed, which contains the truth unless all three lie on one side of it.
    generator = np.random.default_rng(0)
    values = generator.normal(size=(1000, 3))
    found = [bootstrap_over_seeds(sample, i) for i, sample in enumerate(values)]
    assert coverage(found, 0) == pytest.approx(0.75, abs=tolerance(0.75, 1000))
    assert coverage(map(mean_interval, values), 0) == pytest.approx(STATED, abs=tolerance(STATED, 1000))


def test_three_seeds_that_a_bootstrap_takes_for_proof_are_undecided():
    # The seeds' CKAs are all above .9, and so is every resample's mean.
    values = np.array([0.905, 0.93, 0.96])
    _, low, _ = bootstrap_over_seeds(values)
    assert low > 0.9
    _, low, high = mean_interval(values, LOGIT)
    assert low < 0.9 < high < 1
    # Student's interval on the identity scale leaves the possible values.
    assert mean_interval(values)[2] > 1


@pytest.mark.parametrize("scale", [LOG, LOGIT, FISHER, between(1, 8)], ids=["log", "logit", "Fisher", "1 to 8"])
def test_an_interval_of_the_identity_scale_can_be_moved_to_another(scale):
    values = [scale.low + x for x in (0.2, 0.5, 0.8)]
    assert on_scale(*mean_interval(values), scale) == pytest.approx(mean_interval(values, scale))
    wide = on_scale(values[0], values[0] - 99, values[0] + 99, scale)
    assert scale.low <= wide.low < wide.value < wide.high <= scale.high
    if math.isfinite(scale.low):
        assert on_scale(scale.low, scale.low - 1, scale.low + 1, scale) == (scale.low,) * 3
    assert all(map(math.isnan, on_scale(values[0], math.nan, math.nan, scale)[1:]))


def test_a_scale_between_two_bounds_is_the_logit_of_the_share_of_the_way():
    scale, values = between(2.0, 6.0), [3.0, 4.5, 5.0]
    shares = mean_interval([(x - 2) / 4 for x in values], LOGIT)
    assert mean_interval(values, scale) == pytest.approx([2 + 4 * x for x in shares])
    of_correlations = mean_interval([0.1, 0.3, 0.6], between(-1.0, 1.0))
    assert of_correlations == pytest.approx(mean_interval([0.1, 0.3, 0.6], FISHER))


def test_a_clipped_interval_stays_within_limits():
    assert clipped(mean_interval([0.9, -0.9]), -1, 1) == (0, -1, 1)
    assert clipped(mean_interval([0.1, 0.2]), -9, 9) == mean_interval([0.1, 0.2])
    assert all(map(math.isnan, clipped(mean_interval([0.1]), -1, 1)[1:]))


def test_students_interval_is_that_of_scipy():
    sample = [1.0, 2.0, 4.0, 9.0]
    low, high = stats.ttest_1samp(sample, 0).confidence_interval(0.9)
    assert mean_interval(sample, level=0.9) == pytest.approx((4, low, high))
    # To first order, ends on another scale are those of the scale's values.
    near = 0.5 + 1e-4 * np.array([1.0, 2.0, 4.0])
    of_logits = special.expit(mean_interval(special.logit(near).tolist())[1:])
    assert mean_interval(near.tolist(), LOGIT)[1:] == pytest.approx(of_logits, abs=1e-7)


@pytest.mark.parametrize("scale", [IDENTITY, LOG, LOGIT, FISHER], ids=["identity", "log", "logit", "Fisher"])
def test_what_degenerate_samples_give(scale):
    value, low, high = mean_interval([0.5], scale)
    assert value == 0.5
    assert math.isnan(low)
    assert math.isnan(high)
    assert mean_interval([0.5, 0.5, 0.5], scale) == (0.5, 0.5, 0.5)
    assert all(map(math.isnan, mean_interval([0.5, math.nan], scale)))
    for bound in (scale.low, scale.high):
        if math.isfinite(bound):
            assert mean_interval([bound, bound], scale) == (bound, bound, bound)
            value, low, high = mean_interval([bound, 0.5, 0.5], scale)
            assert scale.low <= low < value < high <= scale.high
            with pytest.raises(ValueError, match="expected values from"):
                mean_interval([0.5, 2 * bound - 0.5 * (scale.low + min(scale.high, 1))], scale)
    with pytest.raises(ValueError, match="at least one value"):
        mean_interval([], scale)
    with pytest.raises(ValueError, match="level"):
        mean_interval([0.1, 0.2], scale, level=1.0)


# --- differences over seeds and rows --------------------------------------------------------------------------------

EFFECTS = {"seeds": (1.0, 0.1, 0.3), "rows": (0.0, 1.0, 0.3), "interaction": (0.0, 0.0, 1.0), "all": (0.2, 1.0, 1.0)}
"""Standard deviations of the effects of seeds, rows and their interaction."""


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("name", EFFECTS)
def test_paired_differences_are_covered_whatever_scatters(name, seeds):
    of_seed, of_row, of_both = EFFECTS[name]
    generator, rows, draws = np.random.default_rng(seeds), 40, 2000
    values = (
        of_seed * generator.normal(size=(draws, seeds, 1))
        + of_row * generator.normal(size=(draws, 1, rows))
        + of_both * generator.normal(size=(draws, seeds, rows))
    )
    assert coverage(map(crossed_interval, values), 0) >= LEAST - tolerance(LEAST, draws)


@pytest.mark.parametrize("seeds", SEEDS)
def test_paired_differences_of_accuracies_are_covered(seeds):
    # Both methods are right on easy rows; a seed makes one of them better or worse on all rows.
    generator, rows, draws = np.random.default_rng(seeds), 100, 1500
    easy = generator.normal(size=(draws, 1, rows))
    right = [
        easy + 0.2 * generator.normal(size=(draws, seeds, 1)) + generator.normal(size=(draws, seeds, rows)) > -shift
        for shift in (1.0, 0.5)
    ]
    truth = float(np.subtract(*(special.ndtr(shift / math.sqrt(2.04)) for shift in (1.0, 0.5))))
    differences = right[0].astype(float) - right[1]
    assert coverage(map(crossed_interval, differences), truth) >= LEAST - tolerance(LEAST, draws)


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / math.sqrt((x @ x) * (y @ y)))


def test_paired_differences_of_correlations_are_covered_by_their_jackknife():
    generator, seeds, rows, draws = np.random.default_rng(0), 3, 40, 300

    def one(truths: tuple[float, float]) -> np.ndarray:
        labels, values = generator.normal(size=rows), []
        for _ in range(seeds):
            row = np.zeros(rows)
            for sign, truth in zip((1, -1), truths):
                rho = truth + 0.05 * generator.uniform(-1, 1)
                found = rho * labels + math.sqrt(1 - rho**2) * generator.normal(size=rows)
                row += sign * row_values(lambda kept, f=found: correlation(f[kept], labels[kept]), rows)
            values.append(row)
        return np.array(values)

    found = [crossed_interval(one((0.7, 0.5))) for _ in range(draws)]
    assert coverage(found, 0.2) >= LEAST - tolerance(LEAST, draws)


def test_rows_alone_would_miss_the_seeds_scatter_and_seeds_alone_that_of_the_rows():
    generator, draws = np.random.default_rng(1), 500
    seeds, rows = generator.normal(size=(draws, 3, 1)), generator.normal(size=(draws, 1, 40))
    of_seeds = [mean_interval(v.mean(0)) for v in seeds + 0.5 * generator.normal(size=(draws, 3, 40))]
    of_rows = [mean_interval(v.mean(1)) for v in rows + 0.1 * generator.normal(size=(draws, 3, 40))]
    assert coverage(of_seeds, 0) < 0.5
    assert coverage(of_rows, 0) < 0.5


def test_values_of_the_rows_of_a_mean_are_the_rows_and_those_of_any_score_have_it_as_mean():
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(2, 30))
    assert row_values(lambda kept: float(x[kept].mean()), 30) == pytest.approx(x)
    assert row_values(lambda kept: correlation(x[kept], y[kept]), 30).mean() == pytest.approx(correlation(x, y))
    # The scatter over rows is the standard error of the score: for a correlation of 0, about 1 / sqrt(n).
    x, y = generator.normal(size=(2, 400))
    found = row_values(lambda kept: correlation(x[kept], y[kept]), 400)
    assert found.std() / 20 == pytest.approx(1 / 20, rel=0.2)
    # In groups, the same error from fewer evaluations.
    grouped = row_values(lambda kept: correlation(x[kept], y[kept]), 400, groups=100)
    assert len(grouped) == 100
    assert grouped.std() / 10 == pytest.approx(1 / 20, rel=0.3)


def test_variance_components_are_those_planted():
    generator = np.random.default_rng(0)
    values = (
        2 * generator.normal(size=(300, 1)) + 3 * generator.normal(size=(1, 400)) + generator.normal(size=(300, 400))
    )
    assert variance_components(values) == pytest.approx((4, 9, 1), rel=0.2)
    assert variance_components(np.ones((2, 3))) == (0, 0, 0)
    with pytest.raises(ValueError, match="two seeds"):
        variance_components(np.ones((1, 3)))


def test_degenerate_tables():
    for values in (np.array([[0.0, 1.0]]), np.array([[0.0], [1.0]])):
        value, low, high = crossed_interval(values)
        assert value == 0.5
        assert math.isnan(low)
        assert math.isnan(high)
    assert crossed_interval(np.ones((3, 4)), LOGIT) == (1, 1, 1)
    # Only rows differ: their own degrees of freedom.
    value, error, degrees = crossed_error(np.tile(np.arange(5.0), (3, 1)))
    assert (value, error, degrees) == pytest.approx((2, math.sqrt(2.5 / 5), 4))
    value, low, high = crossed_interval(np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]), LOGIT)
    assert 0 < low < value < high < 1
    with pytest.raises(ValueError, match="one seed and one row"):
        crossed_interval(np.ones((0, 3)))


# --- several comparisons --------------------------------------------------------------------------------------------


def test_p_values_agree_with_intervals():
    values = [0.1, 0.3, 0.2, 0.6]
    _, low, _ = mean_interval(values)
    error = float(np.std(values, ddof=1)) / 2
    assert p_value(0.3, error, 3, low) == pytest.approx(0.05)
    assert p_value(0.3, error, 3) == pytest.approx(stats.ttest_1samp(values, 0)[1])
    assert (p_value(0.3, 0.0, 2), p_value(0.3, 0.0, 2, 0.3)) == (0, 1)
    assert math.isnan(p_value(0.3, math.nan, math.nan))


def test_holm_adjusts_as_published():
    # Holm (1979), sec. 3: reject while the i-th smallest is at most alpha / (m - i + 1).
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.4, 0.6]) == pytest.approx([0.8, 0.8])
    assert holm([0.7]) == [0.7]
    assert holm([]) == []
    known, unknown = holm([0.02, math.nan])
    assert known == pytest.approx(0.04)
    assert math.isnan(unknown)


def test_holm_keeps_the_chance_of_any_false_rejection():
    generator, draws = np.random.default_rng(0), 2000
    statistics = generator.normal(size=(draws, 6)) + generator.normal(size=(draws, 1))
    statistics[:, 0] += 9.0  # One of the six is no null hypothesis.
    p = 2 * special.ndtr(-abs(statistics) / math.sqrt(2))
    false = [min(holm(row)[1:]) <= 0.05 for row in p]
    uncorrected = (p[:, 1:].min(axis=1) <= 0.05).mean()
    assert np.mean(false) <= 0.05 + tolerance(0.05, draws) < uncorrected


def test_a_mean_of_values_beyond_their_bounds_has_no_interval_unless_it_is_rounding():
    assert bounded_mean([1 + 1e-7, 0.9, 0.95], LOGIT) == mean_interval([1.0, 0.9, 0.95], LOGIT)
    value, low, high = bounded_mean([-0.03, 0.2], LOGIT)
    assert value == pytest.approx(0.085)
    assert math.isnan(low)
    assert math.isnan(high)
    assert all(map(math.isnan, bounded_mean([math.nan, 0.5], LOGIT)))
