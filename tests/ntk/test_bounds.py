"""Random projections of inner products: the bound, the exact variance and tail, and both for kernels of methods."""

import math

import mpmath
import numpy as np
import pytest
import torch
from scipy.stats import binom, chi2, norm

import ntk
from ntk import bounds
from ntk.adapters import LoRA
from ntk.infinite.networks import MLP, Recipe, is_multiplier


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit(rho: float, n: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Two unit vectors with the inner product rho."""
    basis = torch.linalg.qr(torch.randn(n, 2, generator=generator(1), dtype=torch.float64)).Q
    return basis[:, 0], rho * basis[:, 0] + math.sqrt(1 - rho**2) * basis[:, 1]


# --- the tail --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 7, 200, 5000])
@pytest.mark.parametrize("epsilon", [0.05, 0.5])
def test_tail_of_equal_and_opposite_vectors_is_that_of_chi_square(d, epsilon):
    expected = chi2.sf(d * (1 + epsilon), d) + chi2.cdf(d * (1 - epsilon), d)
    assert bounds.tail(d, epsilon, 1) == pytest.approx(expected, rel=1e-9)
    assert bounds.tail(d, epsilon, -1) == pytest.approx(expected, rel=1e-9)


def test_tail_of_one_projection_of_orthogonal_vectors_is_that_of_a_product_of_normals():
    z = np.linspace(-12, 12, 200_001)
    expected = np.trapezoid(norm.pdf(z) * 2 * norm.sf(0.3 / np.abs(np.where(z == 0, 1e-300, z))), z)
    assert bounds.tail(1, 0.3, 0) == pytest.approx(float(expected), rel=1e-6)


def test_tail_nears_the_normal_one_of_the_exact_variance():
    d, rho = 400_000, 0.4
    epsilon = 1.5 * math.sqrt(bounds.variance(d, rho))
    assert bounds.tail(d, epsilon, rho) == pytest.approx(2 * norm.sf(1.5), rel=2e-2)


def tail_by_mpmath(d: int, epsilon: float, rho: float) -> float:
    """By the characteristic function with 40 digits, over the line through each side's saddle point."""

    def side(A, B, s):
        # K'(t) = s for K(t) = -(log(1 - A t) + log(1 + B t)) / 2
        p, q, r = 2 * s * A * B, 2 * A * B + 2 * s * (A - B), A - B - 2 * s
        t0 = min(t for t in mpmath.polyroots([p, q, r]) if t > 0)
        K = lambda t: -(mpmath.log(1 - A * t) + mpmath.log(1 + B * t)) / 2  # noqa: E731
        width = 1 / mpmath.sqrt(d * (A**2 / (1 - A * t0) ** 2 + B**2 / (1 + B * t0) ** 2) / 2)
        base = d * (K(t0) - s * t0)

        def integrand(u):
            t = t0 + 1j * u * width
            return (mpmath.exp(d * (K(t) - s * t) - base) / t).real

        return mpmath.exp(base) * width / mpmath.pi * mpmath.quad(integrand, [0, 0.5, 2, 5, 11])

    with mpmath.workdps(40):
        rho, epsilon = mpmath.mpf(rho), mpmath.mpf(epsilon)
        return float(side(1 + rho, 1 - rho, rho + epsilon) + side(1 - rho, 1 + rho, epsilon - rho))


@pytest.mark.parametrize(
    ("d", "deviations", "rho"),
    [(2000, 5, 0.3), (10**4, 13, -0.9), (10**7, 5, 0.999), (10**7, 0.5, 0.3), (10**9, 13, 0.3), (10**14, 5, -0.9)],
)
def test_the_tail_keeps_its_digits_at_large_dimensions(d, deviations, rho):
    epsilon = deviations * math.sqrt(bounds.variance(d, rho))
    assert bounds.tail(d, epsilon, rho) == pytest.approx(tail_by_mpmath(d, epsilon, rho), rel=1e-11, abs=0)


def test_both_ways_to_the_tail_agree(monkeypatch):
    cases = [(5000, e, r) for e in (1e-4, 0.03, 0.1, 0.3, 1.2) for r in (-1, -0.7, 0, 0.5, 1)]
    by_quadrature = [bounds.tail(*case) for case in cases]
    monkeypatch.setattr(bounds, "_LARGE", 1)
    for case, expected in zip(cases, by_quadrature, strict=True):
        # Below 1e-40 the quadrature ends before the tail does.
        assert bounds.tail(*case) == pytest.approx(expected, rel=1e-11, abs=1e-50), case


def test_the_bound_is_above_the_exact_tail_everywhere_and_not_by_its_own_making():
    ratios = []
    for d in (1, 3, 10, 100, 1000, 10_000):
        for epsilon in (0.01, 0.1, 0.3, 0.6, 0.9, 0.99):
            for rho in (-1, -0.5, 0, 0.3, 0.9, 1):
                exact, bound = bounds.tail(d, epsilon, rho), bounds.tail_bound(d, epsilon)
                assert exact <= bound
                ratios.append(bound / max(exact, 1e-300))
    assert min(r for r in ratios if r > 1) < 2  # The bound is nearly reached where both are near 1.


@pytest.mark.parametrize("method", bounds.SIMULATIONS)
@pytest.mark.parametrize("rho", [-0.6, 0.0, 1.0])
def test_draws_have_the_exact_mean_variance_and_tail(method, rho):
    d, epsilon, draws = 12, 0.4, 20_000
    x, x2 = unit(rho, 5)
    S = bounds.simulate(x, x2, d, draws=draws, generator=generator(), method=method)
    variance = bounds.variance(d, rho)
    assert abs(float(S.mean()) - rho) < 4 * math.sqrt(variance / draws)
    squares = (S - rho).square()
    assert abs(float(squares.mean()) - variance) < 4 * float(squares.std()) / math.sqrt(draws)
    found = bounds.estimate_tail(x, x2, d, epsilon, draws=draws, generator=generator(1), confidence=0.9999)
    assert found.lower <= bounds.tail(d, epsilon, rho) <= found.upper
    assert found.upper - found.lower < 0.03


@pytest.mark.parametrize("kurtosis", [1.0, 1.8, 3.0])
def test_variance_of_any_vectors_and_entries(kurtosis):
    x, x2 = (torch.tensor(v, dtype=torch.float64) for v in ([1.0, -2.0, 0.5], [0.3, 1.0, 2.0]))
    d, draws = 5, 40_000
    shape = (draws, d, 3)
    W = {
        1.0: lambda: torch.randint(0, 2, shape, generator=generator()) * 2.0 - 1,
        1.8: lambda: (torch.rand(shape, generator=generator(), dtype=torch.float64) * 2 - 1) * math.sqrt(3),
        3.0: lambda: torch.randn(shape, generator=generator(), dtype=torch.float64),
    }[kurtosis]().double()
    S = ((W @ x) * (W @ x2)).mean(dim=1)
    expected = bounds.projection_variance(x, x2, d, kurtosis=kurtosis)
    squares = (S - x @ x2).square()
    assert abs(float(squares.mean()) - expected) < 4 * float(squares.std()) / math.sqrt(draws)
    assert bounds.projection_variance(*unit(0.3), d) == pytest.approx(bounds.variance(d, 0.3))


# --- dimensions and intervals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [None, 0.0, 0.9])
def test_the_dimension_needed_is_the_least_that_is_enough(rho):
    d = bounds.dimension_needed(0.2, 0.95, rho=rho)
    probability = bounds.tail_bound if rho is None else lambda d, e: bounds.tail(d, e, rho)
    assert probability(d, 0.2) <= 0.05 < probability(d - 1, 0.2)
    assert bounds.dimension_needed(0.2, 0.95, rho=0.9) < bounds.dimension_needed(0.2, 0.95)
    assert bounds.dimension_needed(0.2, 0.95, entries=10) == bounds.dimension_needed(0.2, 0.995)


@pytest.mark.parametrize(("successes", "draws"), [(0, 30), (3, 30), (30, 30), (500, 10_000)])
def test_clopper_pearson_by_its_definition(successes, draws):
    found = bounds.clopper_pearson(successes, draws, 0.99)
    assert found.probability == successes / draws
    if successes:
        assert binom.sf(successes - 1, draws, found.lower) == pytest.approx(0.005, rel=1e-8)
    if successes < draws:
        assert binom.cdf(successes, draws, found.upper) == pytest.approx(0.005, rel=1e-8)


def test_the_interval_covers_at_least_as_often_as_it_says():
    p, draws = 0.07, 40
    covered = sum(
        binom.pmf(k, draws, p)
        for k in range(draws + 1)
        if bounds.clopper_pearson(k, draws, 0.9).lower <= p <= bounds.clopper_pearson(k, draws, 0.9).upper
    )
    assert 0.9 <= covered < 0.99


# --- where a projection really is random -----------------------------------------------------------------------------


def test_propulsion_on_one_random_linear_layer_is_the_projection():
    """K_P = k^2 (W x).(W x') / d, with the exact variance over W."""
    x, d, draws = torch.stack(unit(0.5, 8)) * math.sqrt(8), 64, 400
    kernels = []
    for seed in range(draws):
        recipe = Recipe(generator=generator(seed), multipliers="hidden", degree=3)
        network = MLP(8, width=d, depth=1, activation="linear", recipe=recipe)
        with torch.no_grad():
            network.layers[1].weight.copy_(network.layers[1].weight.sign())  # |c_j| = 1 / sqrt(d)
        h = network.layers[0](x).detach()
        kernels.append(h @ h.T / d)
        if seed < 3:
            K = ntk.empirical_ntk(network, x, params=is_multiplier, reduce="trace")
            torch.testing.assert_close(K, 9 * kernels[-1])
    S = torch.stack(kernels)[:, 0, 1]
    squares = (S - 0.5).square()
    assert abs(float(squares.mean()) - bounds.variance(d, 0.5)) < 4 * float(squares.std()) / math.sqrt(draws)


def test_sketches_and_the_rank_of_lora_have_the_variance_of_projections():
    J = torch.randn(3, 20, generator=generator(), dtype=torch.float64)
    K, m, draws = J @ J.T, 6, 3000
    g = generator(1)
    sketches = torch.stack([ntk.gaussian_sketch(K, m, generator=g) for _ in range(draws)])
    error = (sketches - K).square()
    expected = bounds.kernel_variance(K, m)
    assert bool(((error.mean(0) - expected).abs() < 4 * error.std(0) / math.sqrt(draws)).all())
    assert torch.allclose(bounds.kernel_variance(K, 2 * m) * 2, expected)
    # peft draws A uniformly: E[w^4] / E[w^2]^2 = 9 / 5. One layer, one token, g = 1: K = s^2 (A x).(A x').
    layer = torch.nn.Linear(4, 1, bias=False, dtype=torch.float64)
    x = torch.tensor([[1.0, 0.0, 2.0, -1.0], [0.5, 1.0, 1.0, 1.0]], dtype=torch.float64)
    model, rank, draws = torch.nn.Sequential(layer), 3, 400
    methods = {str(seed): LoRA(rank=rank, seed=seed) for seed in range(draws)}
    found = torch.stack(list(ntk.adapter_kernels(model, x, methods, reduce="trace").values()))
    values = found[:, 0, 1] * 3 * 4 / rank  # Entries have variance 1 / (3 n_in), and the sum is over the rank.
    squares = (values - x[0] @ x[1]).square()
    variance = bounds.projection_variance(x[0], x[1], rank, kurtosis=9 / 5)
    assert abs(float(squares.mean()) - variance) < 4 * float(squares.std()) / math.sqrt(draws)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bounds.tail_bound(0, 0.1), "at least 1"),
        (lambda: bounds.tail_bound(10, 1.0), r"epsilon must lie in \(0, 1\); got 1.0: eps\^2 - eps\^3"),
        (lambda: bounds.tail_bound(10, 0), r"must lie in \(0, 1\)"),
        (lambda: bounds.tail(10, -1, 0), "epsilon must lie in"),
        (lambda: bounds.tail(10, 0.1, 1.5), r"must lie in \[-1, 1\]"),
        (lambda: bounds.variance(10, 2), "inner product of unit vectors"),
        (lambda: bounds.dimension_needed(0.1, 1), "confidence must lie between 0 and 1"),
        (lambda: bounds.dimension_needed(1e-6, 0.9), "more than 1000000000 dimensions"),
        (lambda: bounds.dimension_needed(0.1, 0.9, entries=0), "entries must be at least 1"),
        (lambda: bounds.clopper_pearson(3, 2), "0 <= successes <= draws"),
        (
            lambda: bounds.simulate(torch.ones(2), torch.ones(2), 3, draws=2, generator=generator()),
            "x must have unit length; its norm is 1.41421. Divide it by that",
        ),
        (lambda: bounds.simulate(*unit(0), 3, draws=0, generator=generator()), "draws must be at least 1"),
        (lambda: bounds.simulate(*unit(0), 3, draws=1, generator=generator(), method="fast"), "method must be one of"),
        (lambda: bounds.projection_variance(*unit(0), 3, kurtosis=0.5), "at least 1 and must be finite"),
        (lambda: bounds.kernel_variance(torch.ones(2, 3), 3), "square kernel"),
        (lambda: bounds.kernel_variance(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), 3), "not positive semi-definite"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call()
