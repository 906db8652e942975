"""Limits of wide networks: planted values of other implementations, identities, and random networks."""

import math

import mpmath
import numpy as np
import pytest
import torch

import ntk
from ntk import infinite
from ntk.infinite import ACTIVATIONS, mlp_kernels
from ntk.networks import MLP, Recipe, is_multiplier

HOMOGENEOUS = {
    "linear": ACTIVATIONS["linear"],
    "relu": ACTIVATIONS["relu"],
    "leaky_relu": ACTIVATIONS["leaky_relu"],
    "absolute": infinite.leaky_relu(-1.0),
    "steep": infinite.leaky_relu(2.5),
}
SMOOTH = ("erf", "gelu", "tanh", "silu")
NAMES = tuple(ACTIVATIONS)


def inputs(n: int = 6, n_in: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, n_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hard_inputs() -> torch.Tensor:
    """Identical, opposite, zero, parallel and nearly identical rows."""
    x = inputs(6)
    x[1], x[2], x[3], x[4], x[5] = x[0], -x[0], 0, 3 * x[0], x[0]
    x[5, 0] += 1e-7
    return x


def kernels(x, x2=None, **changes) -> infinite.MLPKernels:
    return mlp_kernels(x, x2, **{"depth": 3, "activation": "relu", "sigma_w": 1.4, "sigma_b": 0.3} | changes)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    """Largest difference relative to the largest entry."""
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


# Upper triangles of (NNGP, NTK) by neural-tangents 0.6.5 (jax 0.4.38, float64): three hidden layers, W_std 1.4,
# b_std 0.3.
X = torch.tensor([[1.0, -0.5, 0.25], [0.5, 1.5, -1.0], [-2.0, 0.75, 0.5]], dtype=torch.float64)
PLANTED = {
    "linear": (
        [7.746379359999996, -1.1698461866666654, -9.778615679999996,
         18.50734122666666, -0.5549340799999996, 24.963918346666652],
        [30.016973439999987, -5.647928746666663, -40.08300671999998,
         73.06082090666663, -3.188280319999998, 98.88712938666663],
    ),
    "relu": (
        [1.1564154199999996, 1.067314772322858, 1.0813568671458607,
         2.501535653333332, 1.7992674484881312, 3.3086077933333313],
        [4.092825679999999, 1.733102152432179, 1.4829972650609147,
         9.473306613333328, 3.055987403447289, 12.701595173333327],
    ),
    "leaky_relu": (
        [1.1567090886446338, 1.0557054320132695, 1.060839939978375,
         2.502232898402918, 1.779927362557095, 3.309547184257889],
        [4.093965426514175, 1.7128954718418505, 1.433151124011535,
         9.476060665547314, 3.025563952670316, 12.705317808967196],
    ),
    "erf": (
        [0.9979902852130708, 0.12874571881248806, -0.27603550775581165,
         1.0351457695137578, 0.17599676385559548, 1.0434418888305363],
        [4.70373171030514, 0.04353181929651863, -1.7678533389470246,
         5.586373945442806, 0.24739829172112543, 5.924234984317929],
    ),
    "gelu": (
        [0.7377426760851808, 0.5786949644424578, 0.5675700527621486,
         2.056733889325341, 1.2468325610534372, 2.882725074994676],
        [2.734025893185329, 0.9233018220835635, 0.6994693942902118,
         8.412250639954111, 2.132575747683301, 11.912047352956108],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_nngp_and_ntk_equal_neural_tangents(name):
    result, upper = kernels(X, activation=name), torch.triu_indices(3, 3)
    for kernel, values in zip((result.nngp, result.ntk), PLANTED[name], strict=True):
        expected = torch.tensor(values, dtype=torch.float64)
        assert float(((kernel[*upper] - expected) / expected).abs().max()) < 1e-12


def plane(f, q1: float, q2: float, rho: float) -> float:
    """E[f(h, h')] on a fine grid of the plane: for analytic f the trapezoidal rule is exact to rounding."""
    z = np.arange(-11, 11, 1 / 24) + 0.001
    w = np.exp(-(z**2) / 2) / 24 / math.sqrt(2 * math.pi)
    h = math.sqrt(q1) * z[:, None]
    return float(w @ f(h, math.sqrt(q2) * (rho * z[:, None] + math.sqrt(1 - rho**2) * z[None])) @ w)


NUMPY = {
    "erf": (np.vectorize(math.erf), lambda h: 2 / math.sqrt(math.pi) * np.exp(-(h**2))),
    "gelu": (
        lambda h: h * (1 + np.vectorize(math.erf)(h / math.sqrt(2))) / 2,
        lambda h: (1 + np.vectorize(math.erf)(h / math.sqrt(2))) / 2 + h * np.exp(-(h**2) / 2) / math.sqrt(2 * math.pi),
    ),
    "tanh": (np.tanh, lambda h: 1 / np.cosh(h) ** 2),
    "silu": (lambda h: h / (1 + np.exp(-h)), lambda h: (1 + np.exp(-h) + h * np.exp(-h)) / (1 + np.exp(-h)) ** 2),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_one_layer_against_integrals_over_the_plane(name):
    phi, slope = NUMPY[name]
    x = torch.tensor([[1.0, 0.2], [-0.5, 1.0]], dtype=torch.float64)
    sw, sb = 1.5, 0.4
    result = mlp_kernels(x[:1], x[1:], depth=1, activation=name, sigma_w=sw, sigma_b=sb, degree=3)
    q1, q2, c = (float(sw**2 * (x[i] @ x[j]) / 2 + sb**2) for i, j in ((0, 0), (1, 1), (0, 1)))
    rho = c / math.sqrt(q1 * q2)
    product = plane(lambda h, g: phi(h) * phi(g), q1, q2, rho)
    slopes = plane(lambda h, g: slope(h) * slope(g), q1, q2, rho)
    propulsion = plane(lambda h, g: h * g * slope(h) * slope(g), q1, q2, rho)
    layers = result.layers
    assert layers is not None
    expected = {
        "nngp": (result.nngp, sw**2 * product + sb**2),
        "ntk": (result.ntk, sw**2 * product + sb**2 + c * sw**2 * slopes),
        "propulsion": (result.propulsion, 9 * sw**2 * propulsion),
        "gap is the covariance": (layers.gap[0], sw**2 * (propulsion - c * slopes)),
    }
    for what, (value, by_integral) in expected.items():
        assert float(value) == pytest.approx(by_integral, rel=1e-10), what


@pytest.mark.parametrize("name", ["linear", "erf", "gelu", "tanh", "silu"])
@pytest.mark.parametrize("sigma_b", [0.0, 0.3])
def test_methods_agree_on_hard_inputs(name, sigma_b):
    x = 0.4 * hard_inputs()
    methods = ["series", "quadrature"] + (["closed"] if ACTIVATIONS[name].moments else [])
    results = [
        kernels(x, depth=2, activation=name, sigma_w=1.1, sigma_b=sigma_b, method=m, positions="all") for m in methods
    ]
    for other in results[1:]:
        for field in ("nngp", "ntk", "propulsion", "lora"):
            # 1e-10 is what the plane rule asks of itself; series and closed forms are closer.
            assert close(getattr(other, field), getattr(results[0], field), 1e-9), field


def test_the_series_matches_closed_forms_to_1e_11_up_to_variances_of_100():
    x = 4 * hard_inputs()
    for name, scale in (("gelu", 1.0), ("erf", 0.6)):  # erf steepens with the variance, and its series lengthens
        pairs = infinite.pairs_of_rows(scale * x, scale * x)
        closed, series = ACTIVATIONS[name].moments(pairs), infinite.series_moments(ACTIVATIONS[name], pairs)
        for a, b in zip(closed, series, strict=True):
            assert close(b, a, 1e-11), name


def relu_by_mpmath(x, x2, depth: int, sigma_w: float, sigma_b: float) -> tuple[float, float]:
    """(NTK, Propulsion on the hidden layers) with 50 digits, from arccos as the textbooks have it."""
    with mpmath.workdps(50):
        u, v = ([mpmath.mpf(float(e)) for e in row] for row in (x, x2))
        sw, sb = mpmath.mpf(sigma_w) ** 2, mpmath.mpf(sigma_b) ** 2
        q, p, c = (sw * mpmath.fdot(a, b) / len(u) + sb for a, b in ((u, u), (v, v), (u, v)))
        ntk_, propulsion = c, mpmath.mpf(0)
        for _ in range(depth):
            theta = mpmath.acos(max(min(c / mpmath.sqrt(q * p), 1), -1))
            factor = sw * (mpmath.pi - theta) / (2 * mpmath.pi)
            share = sw * mpmath.sqrt(q * p) * mpmath.sin(theta) / (2 * mpmath.pi) + factor * c
            ntk_, propulsion = ntk_ * factor + share + sb, propulsion * factor + share
            c, q, p = share + sb, sw * q / 2 + sb, sw * p / 2 + sb
        return float(ntk_), float(propulsion)


@pytest.mark.parametrize("sigma_b", [0.0, 0.3])
def test_relu_keeps_all_digits_at_angles_near_0_and_pi(sigma_b):
    x = hard_inputs()
    result = kernels(x, depth=20, sigma_b=sigma_b)
    for i in range(6):
        for j in range(6):
            if sigma_b == 0 and 3 in (i, j):
                assert result.ntk[i, j] == 0
                continue
            expected = relu_by_mpmath(x[i], x[j], 20, 1.4, sigma_b)
            assert (float(result.ntk[i, j]), float(result.propulsion[i, j])) == pytest.approx(expected, rel=2e-13)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sigma_b", [0.0, 0.5])
def test_identical_opposite_and_zero_inputs(name, sigma_b):
    x = 0.5 * hard_inputs()
    result = kernels(x, activation=name, sigma_b=sigma_b, positions="all")
    for kernel in (result.nngp, result.ntk, result.propulsion):
        assert torch.isfinite(kernel).all()
        assert torch.equal(kernel, kernel.T)
        assert float((kernel[0] - kernel[1]).abs().max()) <= 1e-14 * float(kernel.abs().max())
        assert float(torch.linalg.eigvalsh(kernel)[0]) >= -1e-11 * float(kernel.abs().max())
    if sigma_b == 0:
        # phi(0) = 0 for the whole table, so a network without biases is silent at 0.
        for kernel in (result.nngp, result.ntk, result.propulsion):
            assert (kernel[3] == 0).all()
        if name in ("linear", "erf", "tanh"):  # odd
            assert torch.allclose(result.ntk[2], -result.ntk[0], atol=1e-11, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_shares_of_the_layers_add_up(name):
    x, y = inputs(4), inputs(3, seed=1)
    result = kernels(x, y, activation=name, depth=4, degree=7, positions="all")
    layers = result.layers
    assert layers is not None
    assert layers.covariance.shape == layers.weights.shape == layers.biases.shape == (5, 4, 3)
    assert torch.equal(layers.covariance[-1], result.nngp)
    assert close(layers.weights.sum(0), result.ntk_weights, 1e-14)
    assert close(layers.biases.sum(0), result.ntk_biases, 1e-14)
    assert close(result.ntk_weights + result.ntk_biases, result.ntk, 1e-14)
    assert close(layers.propulsion.sum(0) + result.propulsion_input.mean, result.propulsion, 1e-14)
    assert result.positions == ("input", 1, 2, 3, 4)
    some = kernels(x, y, activation=name, depth=4, degree=7, positions=[1, 3], per_layer=False)
    assert some.layers is None
    assert close(layers.propulsion[0] + layers.propulsion[2], some.propulsion, 1e-14)
    assert close(some.ntk, result.ntk, 1e-14)
    # the same numbers as blocks of one symmetric kernel, whatever the order and the array type
    joint = kernels(torch.cat([x, y]).numpy(), activation=name, depth=4, degree=7, positions="all")
    assert close(joint.ntk[:4, 4:], result.ntk, 1e-13)
    assert close(joint.propulsion[4:, :4].T, result.propulsion, 1e-13)
    assert close(kernels(x, y, activation=name, depth=4).propulsion * 49, layers.propulsion.sum(0), 1e-14)


# --- the corrected theorem, and where it fails -----------------------------------------------------------------------


@pytest.mark.parametrize("name", HOMOGENEOUS)
@pytest.mark.parametrize("depth", [0, 1, 5, 60])
def test_corrected_theorem_for_homogeneous_activations(name, depth):
    """Propulsion on input and hidden layers is k^2 times full fine-tuning of all weights, exactly."""
    result = kernels(hard_inputs(), activation=HOMOGENEOUS[name], depth=depth, degree=5, positions="all", sigma_w=1.2)
    assert close(result.propulsion, 25 * result.ntk_weights, 1e-12)
    # Layer by layer it is the *next* layer's weights.
    layers = result.layers
    assert layers is not None
    for propulsion, weights in zip(layers.propulsion, layers.weights[1:], strict=True):
        assert close(propulsion, 25 * weights, 1e-12)
    unbiased = kernels(
        hard_inputs(), activation=HOMOGENEOUS[name], depth=depth, positions="all", sigma_w=1.2, sigma_b=0
    )
    assert close(unbiased.propulsion, unbiased.ntk, 1e-12)


@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_without_the_input_position_the_first_layers_share_is_missing(name):
    x = inputs()
    result = kernels(x, activation=HOMOGENEOUS[name])
    layers = result.layers
    assert layers is not None
    assert close(result.propulsion, result.ntk_weights - layers.weights[0], 1e-12)
    # A tenth at least: nobody may call these kernels equal.
    assert ntk.kernel_distance(result.ntk_weights, result.propulsion) > 0.1


def test_the_gap_of_a_relu_layer_is_the_sine_of_the_angle():
    x = inputs()
    result = kernels(x, depth=1)
    covariance = kernels(x, depth=0).nngp
    norms = covariance.diagonal().sqrt()
    cosine = covariance / norms / norms[:, None]
    layers = result.layers
    assert layers is not None
    expected = 1.4**2 * norms * norms[:, None] * (1 - cosine**2).clamp(min=0).sqrt() / (2 * math.pi)
    assert torch.allclose(
        layers.gap[0], expected, atol=1e-7
    )  # sqrt(1 - cosine^2) loses half the digits at the diagonal
    assert (layers.gap[0].diagonal() == 0).all()
    off = ~torch.eye(len(x), dtype=torch.bool)
    assert float(layers.gap[0][off].min()) > 0.01 * float(layers.covariance[0].diagonal().mean())


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("positions", ["all", "hidden"])
def test_theorem_fails_for_smooth_activations(name, positions):
    """Not a defect: h phi'(h) differs from phi(h), and the kernels differ at any width, even up to scale."""
    x = inputs()
    result = kernels(x, activation=name, positions=positions, sigma_b=0)
    assert ntk.kernel_distance(result.ntk, result.propulsion) > 0.03
    assert ntk.kernel_distance(result.ntk, result.propulsion, scaled=True) > 0.02


@pytest.mark.parametrize(("name", "sign"), [("erf", -1), ("tanh", -1), ("gelu", 1), ("silu", 1)])
def test_gap_on_the_diagonal_is_bounded_away_from_zero(name, sign):
    """For ReLU it vanishes there; saturating activations lose, the others gain."""
    x = inputs()
    layers = kernels(x, activation=name, depth=2).layers
    assert layers is not None
    gap = layers.gap.diagonal(dim1=1, dim2=2)
    share = (layers.weights + layers.biases)[:2].diagonal(dim1=1, dim2=2)
    assert float((sign * gap / share).min()) > 0.05


def test_linear_networks_have_no_gap():
    result = kernels(inputs(), activation="linear")
    layers = result.layers
    assert layers is not None
    assert close(layers.propulsion, (layers.weights + layers.biases)[:3], 1e-14)
    assert float(layers.gap.abs().max()) <= 1e-14 * float(layers.weights.max())


# --- random networks -------------------------------------------------------------------------------------------------


def multiplier_kernel(network: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    z = [p for name, p in network.named_parameters() if is_multiplier(name, p)]
    J = torch.stack([torch.cat(torch.autograd.grad(y, z, retain_graph=True)) for y in network(x)[:, 0]])
    return J @ J.T


def network(width: int, seed: int, activation, *, n_in: int = 5, depth: int = 2, multipliers="hidden") -> MLP:
    recipe = Recipe(
        generator=torch.Generator().manual_seed(seed), sigma_w=1.4, sigma_b=0.3, degree=3, multipliers=multipliers
    )
    return MLP(n_in, width=width, depth=depth, activation=activation, recipe=recipe)


@pytest.mark.parametrize("name", NAMES)
def test_networks_approach_the_limit_as_one_over_root_width(name):
    x = inputs(4)
    limit = kernels(x, activation=name, depth=2, degree=3).propulsion
    errors = []
    widths = (64, 256, 1024)
    for width, draws in zip(widths, (200, 60, 20), strict=True):
        squares = [ntk.kernel_distance(limit, multiplier_kernel(network(width, s, name), x)) ** 2 for s in range(draws)]
        errors.append(math.sqrt(sum(squares) / draws))
    slope = np.polyfit(np.log(widths), np.log(errors), 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.1)
    if name in ("relu", "gelu"):
        wide = ntk.kernel_distance(limit, multiplier_kernel(network(4096, 0, name), x))
        assert wide < 3 * errors[-1] / 2  # the error expected at 4096 is half of that at 1024


@pytest.mark.parametrize("name", ["relu", "erf"])
def test_full_kernel_of_networks_approaches_the_limit_and_the_gap_stands_still(name):
    x = inputs(3)
    limit = kernels(x, activation=name, depth=2, degree=3)
    full, propulsion = (torch.zeros(3, 3, dtype=torch.float64) for _ in range(2))
    draws = 8
    for seed in range(draws):
        net = network(512, seed, name)
        full += ntk.empirical_ntk(net, x, params=lambda n, p: not is_multiplier(n, p), reduce="trace") / draws
        propulsion += ntk.empirical_ntk(net, x, params=is_multiplier, reduce="trace") / draws
    assert ntk.kernel_distance(limit.ntk, full) < 0.1
    assert ntk.kernel_distance(limit.propulsion - 9 * limit.ntk, propulsion - 9 * full) < 0.15


def test_the_input_position_settles_with_the_input_dimension_not_with_the_width():
    """Its kernel is a sum over n_0 coordinates of random sensitivities."""
    spread = {}
    for n_in in (6, 384):
        x = inputs(2, n_in)
        limit = kernels(x, depth=1, degree=3)
        draws = torch.stack(
            [
                multiplier_kernel(network(500, s, "relu", n_in=n_in, depth=1, multipliers=["input"]), x)
                for s in range(150)
            ]
        )
        variance = draws.var(0)
        # 150 draws know a variance to 12 %; width 500 and n_in = 6 leave their own corrections.
        assert torch.allclose(variance, limit.propulsion_input.variance, rtol=0.6)
        spread[n_in] = float((variance.diagonal().sqrt() / limit.propulsion_input.mean.diagonal()).mean())
        if n_in > 100:
            error = (draws.mean(0) - limit.propulsion_input.mean) / (variance / 150).sqrt()
            assert float(error.abs().max()) < 4
    assert spread[6] > 0.4
    assert spread[384] < 0.25


def test_the_readout_stays_random():
    x, draws = inputs(2), 600
    limit = kernels(x, depth=1, degree=3).propulsion_readout
    values = torch.stack(
        [multiplier_kernel(network(100, s, "relu", depth=1, multipliers=["readout"]), x) for s in range(draws)]
    )
    assert torch.allclose(values.mean(0), limit.mean, rtol=0.25)
    assert torch.allclose(values.var(0), limit.variance, rtol=0.5)
    with pytest.raises(ValueError, match="stays random at any width"):
        kernels(x, positions=[1, "readout"])


def test_lora_has_the_kernel_of_the_weights_on_average_with_the_variance_stated():
    x, rank, draws = inputs(2), 4, 800
    limit = kernels(x, depth=1)
    net = network(1500, 0, "relu", depth=1, multipliers=())
    signals: list[torch.Tensor] = []
    handles = [layer.register_forward_hook(lambda m, a, y: signals.extend((a[0], y))) for layer in net.layers]
    outputs = net(x)[:, 0]
    for handle in handles:
        handle.remove()
    generator, total = torch.Generator().manual_seed(1), torch.zeros(draws, 2, 2, dtype=torch.float64)
    for a, y in zip(signals[::2], signals[1::2], strict=True):
        g = torch.stack([torch.autograd.grad(o, y, retain_graph=True)[0][i] for i, o in enumerate(outputs)])
        A = torch.randn(draws, rank, a.shape[1], generator=generator, dtype=torch.float64) / math.sqrt(rank)
        projected = a.detach() @ A.transpose(1, 2)  # (draws, n, r)
        total += (g @ g.T) * (projected @ projected.transpose(1, 2)) * 1.4**2 / a.shape[1]
    assert torch.allclose(total.mean(0), limit.lora, rtol=0.15)
    assert torch.allclose(total.var(0), limit.lora_variance(rank), rtol=0.3)
    assert torch.allclose(limit.lora_variance(8) * 2, limit.lora_variance(rank))
    with pytest.raises(ValueError, match="at least 1"):
        limit.lora_variance(0)


# --- sizes and mistakes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["relu", "erf", "gelu", "tanh"])
def test_hundreds_of_layers(name):
    x = hard_inputs()
    result = kernels(x, activation=name, depth=300, sigma_w=1.0, sigma_b=0.05, per_layer=False)
    for kernel in (result.nngp, result.ntk, result.propulsion):
        assert torch.isfinite(kernel).all()
        assert torch.equal(kernel[0], kernel[1])
    critical = kernels(x, depth=300, sigma_w=2**0.5, sigma_b=0, per_layer=False)
    # He initialisation keeps the variance; each of 301 layers adds as much to the diagonal of the NTK.
    assert torch.allclose(critical.nngp.diagonal(), 2 * (x * x).mean(1), rtol=1e-12)
    assert torch.allclose(critical.ntk.diagonal(), 301 * critical.nngp.diagonal(), rtol=1e-12)


def test_thousands_of_inputs():
    x = inputs(1500)
    large = kernels(x, depth=2, activation="gelu", per_layer=False)
    small = kernels(x[:5], x[-7:], depth=2, activation="gelu")
    assert close(large.ntk[:5, -7:], small.ntk, 1e-13)
    assert torch.allclose(large.ntk.diagonal(), kernels(x[:1], depth=2, activation="gelu").ntk[0, 0]) is False


def test_depth_zero_is_the_linear_model():
    result = kernels(X, depth=0, positions="all", degree=2)
    expected = 1.4**2 * X @ X.T / 3 + 0.3**2
    assert torch.allclose(result.ntk, expected, rtol=1e-14)
    assert torch.equal(result.nngp, result.ntk)
    assert torch.allclose(result.propulsion, 4 * (expected - 0.09), rtol=1e-14)
    assert result.layers is not None
    assert result.layers.gap.shape == (0, 3, 3)


def test_any_differentiable_function_is_an_activation():
    x = 0.5 * inputs(4)
    expected = kernels(x, activation="tanh")
    given = kernels(x, activation=lambda h: torch.tanh(h))
    assert close(given.ntk, expected.ntk, 1e-13)
    assert close(given.propulsion, expected.propulsion, 1e-13)
    # E[sin sin'] = exp(-(q + q')/2) sinh(c)
    sine = kernels(x, activation=torch.sin, depth=1, sigma_w=1, sigma_b=0)
    c = x @ x.T / 5
    q = c.diagonal()
    assert close(sine.nngp, torch.exp(-(q + q[:, None]) / 2) * torch.sinh(c), 1e-13)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernels(X, activation=torch.sign), "has no usable derivative.*It jumps"),
        (lambda: kernels(X, activation=lambda h: torch.zeros_like(h) + 1), "autograd sees no dependence"),
        (lambda: kernels(X, activation=lambda h: h.sum()), "elementwise"),
        (lambda: kernels(X, activation="swish"), "activation must be one of 'linear'"),
        (lambda: kernels(X, activation=torch.relu), r"do not converge: .* reach a relative error of .*Kinks"),
        (lambda: kernels(X, method="series"), "do not converge"),
        (lambda: kernels(X, activation="tanh", method="quadrature", sigma_w=9), "Gauss-Hermite nodes reach"),
        (lambda: kernels(X, activation="tanh", method="closed"), "no closed forms"),
        (lambda: kernels(X, method="exact"), "method must be one of"),
        (lambda: kernels(X, depth=-1), "at least 0"),
        (lambda: kernels(X, sigma_w=0), "sigma_w must be positive"),
        (lambda: kernels(X, sigma_b=-1), "sigma_b must be at least 0"),
        (lambda: kernels(X, degree=math.inf), "degree must be finite"),
        (lambda: kernels(X, positions=[4]), r"hidden layers 1\.\.3"),
        (lambda: kernels(X, positions=[1, 1]), "distinct"),
        (lambda: kernels(X, positions="embedding"), "positions must be"),
        (lambda: kernels(X, X[:, :2]), "same number of columns"),
        (lambda: kernels(X[0]), r"matrix of inputs, \(n, n_0\)"),
        (lambda: kernels(X * math.nan), "NaN"),
        (lambda: infinite.leaky_relu(math.inf), "must be finite"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call()
