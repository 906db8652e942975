"""Positively homogeneous activations of any degree, and that no others have their law."""

import math

import mpmath
import numpy as np
import pytest
import torch
from scipy.integrate import quad

import ntk
from ntk.infinite import (
    ACTIVATIONS,
    Activation,
    closed_forms,
    diagonal_moments,
    leaky_relu,
    mlp_kernels,
    pairs_of_rows,
    relu_power,
    series_moments,
)
from ntk.infinite.networks import MLP, Recipe

POWERS = (0.75, 1.25, 1.5, 2.0, 2.5, 3.0)
SMOOTH = ("erf", "gelu", "tanh", "silu")


def inputs(n: int = 5, n_in: int = 3) -> torch.Tensor:
    return torch.randn(n, n_in, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


def by_angle(p: float, theta: float) -> float:
    """E[max(h, 0)^p max(h', 0)^p] at variances 1 and angle theta, by an integral over the direction of (h, h')."""
    with mpmath.workdps(30):
        inner = mpmath.quad(
            lambda t: (mpmath.cos(t) * mpmath.cos(t - theta)) ** mpmath.mpf(p),
            [theta - mpmath.pi / 2, theta / 2, mpmath.pi / 2],
        )
        return float(2 ** mpmath.mpf(p) * mpmath.gamma(p + 1) * inner / (2 * mpmath.pi))


@pytest.mark.parametrize("p", [0.5, *POWERS])
@pytest.mark.parametrize("theta", [1e-3, 0.4, 1.5, 2.8])
def test_expectations_are_integrals_over_the_angle(p, theta):
    q1, q2 = 0.7, 1.9
    row = torch.tensor([[1.0, 0.0]], dtype=torch.float64) * math.sqrt(q1)
    other = torch.tensor([[math.cos(theta), math.sin(theta)]], dtype=torch.float64) * math.sqrt(q2)
    pairs = pairs_of_rows(row, other)
    found = closed_forms.relu_power(pairs, p, 0.0)
    product = (q1 * q2) ** (p / 2) * by_angle(p, theta)
    # Close to pi the two parts cancel; they are of the size of the expectation at theta = 0.
    size = (q1 * q2) ** (p / 2) * by_angle(p, 0.0)
    assert float(found.product) == pytest.approx(product, abs=1e-13 * size)
    assert float(found.propulsion) == pytest.approx(p**2 * product, abs=1e-13 * p**2 * size)
    slopes = p**2 * (q1 * q2) ** ((p - 1) / 2) * by_angle(p - 1, theta)
    assert float(found.slopes) == pytest.approx(slopes, rel=1e-10)


def test_whole_powers_are_the_arc_cosine_kernels():
    """J_2 = 3 sin cos + (pi - t)(1 + 2 cos^2); the slopes are of order 1 (Cho and Saul 2009, eq. 4-7)."""
    pairs = pairs_of_rows(inputs(), inputs())
    theta = math.pi - pairs.coangle
    order2 = 3 * theta.sin() * theta.cos() + (math.pi - theta) * (1 + 2 * theta.cos() ** 2)
    found = relu_power(2).moments(pairs)
    assert close(found.product, pairs.scale**2 * order2 / (2 * math.pi), 1e-13)
    assert close(found.slopes, 4 * ACTIVATIONS["relu"].moments(pairs).product, 1e-13)


@pytest.mark.parametrize("negative", [0.0, -1.0, 0.5])
@pytest.mark.parametrize("p", [2.0, 2.5, 3.0])
def test_both_sides_equal_the_series(p, negative):
    x = inputs()
    activation = relu_power(p, negative)
    pairs = pairs_of_rows(x, torch.cat([x, -x[:1]]))
    for closed, series in zip(activation.moments(pairs), series_moments(activation, pairs), strict=True):
        assert close(closed, series, 1e-12)


def test_the_function_and_its_derivative():
    h = torch.linspace(-3, 3, 40, dtype=torch.float64, requires_grad=True)
    for p, negative in ((0.75, 0.3), (2.0, -1.0), (3.0, 0.0)):
        activation = relu_power(p, negative)
        (expected,) = torch.autograd.grad(activation.function(h).sum(), h)
        torch.testing.assert_close(activation.derivative(h.detach()), expected)
        torch.testing.assert_close(h * activation.derivative(h), p * activation.function(h))
    zero = torch.zeros(1, dtype=torch.float64)
    assert relu_power(0.75).function(zero) == relu_power(0.75).derivative(zero) == 0
    assert relu_power(1, -0.3).moments.keywords == leaky_relu(0.3).moments.keywords


@pytest.mark.parametrize("negative", [0.0, -1.0, 0.5])
@pytest.mark.parametrize("p", [*POWERS, 1.0])
def test_degree_p_gives_p_squared_k_squared_times_the_next_layers_weights(p, negative):
    x = 0.5 * inputs()
    layers = mlp_kernels(x, depth=3, activation=relu_power(p, negative), sigma_w=1.2, sigma_b=0.3, degree=5).layers
    for propulsion, weights in zip(layers.propulsion, layers.weights[1:], strict=True):
        assert close(propulsion, p**2 * 25 * weights, 1e-12)


def test_networks_of_squared_relu_have_four_times_the_next_layers_weights():
    x, draws = inputs(4), 6
    scales, following = 0.0, 0.0
    for seed in range(draws):
        made = Recipe(generator=torch.Generator().manual_seed(seed), sigma_w=1.2, multipliers=(1,), degree=3)
        kernels = ntk.layer_kernels(MLP(3, width=2048, depth=1, activation=relu_power(2), recipe=made), x)
        scales = scales + kernels["layers.0.multiplier.z"] / draws
        following = following + kernels["layers.1.weight"] / draws
    assert ntk.kernel_distance(4 * 9 * following, scales) < 0.1
    assert ntk.kernel_distance(9 * following, scales) > 1


def ratios(activation: Activation) -> torch.Tensor:
    """E[h^2 phi'^2] / E[phi^2] over variances from 1e-2 to 1e2, constant for a homogeneous function."""
    moments = diagonal_moments(activation, torch.logspace(-2, 2, 9, dtype=torch.float64))
    return moments.propulsion / moments.product


@pytest.mark.parametrize("name", SMOOTH)
def test_other_activations_have_no_such_law(name):
    found = ratios(ACTIVATIONS[name])
    assert float(found.max() / found.min()) > 1.2
    homogeneous = ratios(relu_power(2.0, 0.4))
    assert float(homogeneous.max() / homogeneous.min()) == pytest.approx(1, abs=1e-12)


def coefficients(activation: Activation, q: float, count: int = 6) -> np.ndarray:
    """a_k(q) = E[phi(sqrt(q) z) He_k(z)] / sqrt(k!), the coefficients of the proof."""
    found = []
    for k in range(count):
        hermite = np.polynomial.hermite_e.HermiteE.basis(k)

        def integrand(z, hermite=hermite):
            value = float(activation.function(torch.tensor(math.sqrt(q) * z, dtype=torch.float64)))
            return value * hermite(z) * math.exp(-(z**2) / 2)

        whole = sum(quad(integrand, *ends, epsabs=1e-12)[0] for ends in ((-12, 0), (0, 12)))
        found.append(whole / math.sqrt(2 * math.pi * math.factorial(k)))
    return np.array(found)


def test_the_coefficients_of_the_proof_are_powers_of_the_variance_for_homogeneous_functions_alone():
    """2 q a_k' = p a_k for degree p, so a_k(4 q) = 2^p a_k(q)."""
    for p, negative in ((1.5, 0.4), (2.0, 0.0)):
        once, fourfold = (coefficients(relu_power(p, negative), q) for q in (0.5, 2.0))
        np.testing.assert_allclose(fourfold, 2**p * once, atol=1e-11)
    once, fourfold = (coefficients(ACTIVATIONS["gelu"], q) for q in (0.5, 2.0))
    grown = fourfold[:3] / once[:3]
    assert max(grown) / min(grown) > 1.2


@pytest.mark.parametrize(
    ("activation", "affine"),
    [
        (lambda h: 2 * h + 1, True), ("linear", True), ("relu", False), (relu_power(2), False),
        (lambda h: h + 0.1 * torch.tanh(h), False), (lambda h: h**2, False), *((name, False) for name in SMOOTH),
    ],
)  # fmt: skip
def test_the_gap_vanishes_at_all_covariances_for_affine_functions_alone(activation, affine):
    layers = mlp_kernels(inputs(), depth=1, activation=activation, sigma_w=1.2, sigma_b=0.3).layers
    share = float((layers.gap.abs() / (layers.weights + layers.biases)[0].diagonal().max()).max())
    assert share < 1e-12 if affine else share > 1e-3


@pytest.mark.parametrize("name", ["tanh", "gelu"])
def test_the_coefficients_of_the_second_proof_add_up_to_the_gap(name):
    """With alpha_k = E[phi'(sqrt(q) z) He_k(z)], term by term; and 2 q alpha_k' = alpha_{k+2} + k alpha_k."""
    slope, z = ACTIVATIONS[name].derivative, torch.linspace(-12, 12, 6001, dtype=torch.float64)
    weights = torch.exp(-(z**2) / 2) * (z[1] - z[0]) / math.sqrt(2 * math.pi)

    def alpha(q: float, count: int = 40) -> np.ndarray:
        values = (weights * slope(math.sqrt(q) * z)).numpy()
        return np.polynomial.hermite_e.hermevander(z.numpy(), count).T @ values

    q1, q2, rho, step = 0.6, 1.7, 0.4, 1e-4
    a, b = alpha(q1), alpha(q2)
    terms = [
        rho**k / math.factorial(k) * ((a[k + 1] + k * a[k - 1]) * (b[k + 1] + k * b[k - 1]) - k * a[k - 1] * b[k - 1])
        for k in range(39)
    ]
    rows = torch.tensor([[1.0, 0.0], [rho, math.sqrt(1 - rho**2)]], dtype=torch.float64)
    pairs = pairs_of_rows(math.sqrt(q1) * rows[:1], math.sqrt(q2) * rows[1:])
    moments = series_moments(ACTIVATIONS[name], pairs)
    gap = float(moments.propulsion - pairs.cov * moments.slopes)
    assert math.sqrt(q1 * q2) * sum(terms) == pytest.approx(gap, rel=1e-8)
    derivative = (alpha(q1 + step) - alpha(q1 - step)) / (2 * step)
    k = np.arange(6)
    np.testing.assert_allclose(2 * q1 * derivative[:6], a[2:8] + k * a[:6], atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: relu_power(0.5), "above 1/2"),
        (lambda: relu_power(math.nan), "above 1/2"),
        (lambda: relu_power(2, math.inf), "must be finite"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_powers_have_no_gradients_in_the_inputs():
    with pytest.raises(NotImplementedError, match="no gradients in the inputs"):
        mlp_kernels(inputs().requires_grad_(), depth=1, activation=relu_power(2), sigma_w=1, sigma_b=0)
