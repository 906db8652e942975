"""Limits of wide networks: compared with values of other implementations, identities, and random networks."""

import itertools
import json
import math
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from scipy.special import erf, ndtr

import ntk
from ntk import infinite
from ntk.infinite import ACTIVATIONS, mlp_kernels
from ntk.infinite.networks import MLP, Recipe, is_multiplier

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


X = torch.tensor([[1.0, -0.5, 0.25], [0.5, 1.5, -1.0], [-2.0, 0.75, 0.5]], dtype=torch.float64)

# Written by tests/oracles/neural_tangents_table.py in a separate environment.
ORACLE = json.loads((Path(__file__).parents[2] / "oracles" / "neural_tangents.json").read_text(encoding="utf-8"))
ORACLE_ACTIVATIONS = {
    "leaky_relu(0.3)": infinite.leaky_relu(0.3),
    "leaky_relu(-1)": infinite.leaky_relu(-1.0),
    "sin": torch.sin,  # Ours is by the series; that library has a closed form.
}


@pytest.mark.parametrize("row", ORACLE["rows"], ids=lambda row: f"{row['activation']}-{row['depth']}")
def test_nngp_and_ntk_equal_neural_tangents(row):
    x = torch.tensor(ORACLE["inputs"], dtype=torch.float64)
    activation = ORACLE_ACTIVATIONS.get(row["activation"], row["activation"])
    result = mlp_kernels(x, depth=row["depth"], activation=activation, sigma_w=row["sigma_w"], sigma_b=row["sigma_b"])
    # At depth 50 the inputs are nearly parallel, and that library takes arccos of a cosine rounded to 1 - 1e-7.
    tolerance = 1e-10 if row["depth"] == 50 else 1e-12
    for name in ("nngp", "ntk"):
        found = getattr(result, name)[*torch.triu_indices(len(x), len(x))]
        expected = torch.tensor(row[name], dtype=torch.float64)
        # Relative to each entry; for sin to the largest, since its entries of 1e-7 come from a cancelling sum.
        size = expected.abs().max() if row["activation"] == "sin" else expected
        assert float(((found - expected) / size).abs().max()) < tolerance, name


def plane(f, q1: float, q2: float, rho: float) -> float:
    """E[f(h, h')] by the trapezoidal rule on a fine grid of the plane, exact to rounding for analytic f."""
    z = np.arange(-11, 11, 1 / 24) + 0.001
    w = np.exp(-(z**2) / 2) / 24 / math.sqrt(2 * math.pi)
    h, h2 = math.sqrt(q1) * z[:, None], math.sqrt(q2) * (rho * z[:, None] + math.sqrt(1 - rho**2) * z[None])
    return float(w @ np.broadcast_to(f(h, h2), h2.shape) @ w)


NUMPY = {
    "erf": (erf, lambda h: 2 / math.sqrt(math.pi) * np.exp(-(h**2))),
    "gelu": (lambda h: h * ndtr(h), lambda h: ndtr(h) + h * np.exp(-(h**2) / 2) / math.sqrt(2 * math.pi)),
    "tanh": (np.tanh, lambda h: 1 / np.cosh(h) ** 2),
    "silu": (lambda h: h / (1 + np.exp(-h)), lambda h: (1 + np.exp(-h) + h * np.exp(-h)) / (1 + np.exp(-h)) ** 2),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_every_kernel_against_integrals_over_the_plane(name):
    """The textbook recursion in numpy, with expectations by another integration rule."""
    phi, slope = NUMPY[name]
    x = np.array([[1.0, 0.2], [-0.5, 1.0]])
    sw, sb, depth = 1.5, 0.4, 3
    q1, q2, c = (sw**2 * float(x[i] @ x[j]) / 2 + sb**2 for i, j in ((0, 0), (1, 1), (0, 1)))
    full, propulsion, gaps = c, 0.0, []
    for _ in range(depth):
        rho = c / math.sqrt(q1 * q2)
        product = plane(lambda h, g: phi(h) * phi(g), q1, q2, rho)
        slopes = plane(lambda h, g: slope(h) * slope(g), q1, q2, rho)
        multiplied = plane(lambda h, g: h * g * slope(h) * slope(g), q1, q2, rho)
        gaps = [gap * sw**2 * slopes for gap in gaps] + [sw**2 * (multiplied - c * slopes)]
        propulsion = propulsion * sw**2 * slopes + sw**2 * multiplied
        full = full * sw**2 * slopes + sw**2 * product + sb**2
        q1, q2 = (sw**2 * plane(lambda h, _: phi(h) ** 2, q, q, 0.0) + sb**2 for q in (q1, q2))
        c = sw**2 * product + sb**2
    tensor = torch.from_numpy(x)
    result = mlp_kernels(tensor[:1], tensor[1:], depth=depth, activation=name, sigma_w=sw, sigma_b=sb, degree=3)
    assert result.layers is not None
    assert float(result.nngp) == pytest.approx(c, rel=1e-12)
    assert float(result.ntk) == pytest.approx(full, rel=1e-12)
    assert float(result.propulsion) == pytest.approx(9 * propulsion, rel=1e-12)
    # The gap is a difference of moments of order 1.
    assert result.layers.gap.flatten().tolist() == pytest.approx(gaps, abs=1e-13)


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
            # Two layers amplify the error of 1e-12 in E|f f'| that both rules allow.
            assert close(getattr(other, field), getattr(results[0], field), 1e-11), field


@pytest.mark.parametrize("name", ["linear", "relu", "leaky_relu", "erf", "gelu"])
def test_series_and_plane_match_closed_forms_up_to_variances_of_1000(name):
    # Without the input 0, where the derivative of a kink is a convention that no kernel depends on.
    activation, x = ACTIVATIONS[name], 4 * hard_inputs()[[0, 1, 2, 4, 5]]
    pairs = infinite.pairs_of_rows(x, x)
    assert float(pairs.q1.max()) > 1000
    assert activation.moments is not None
    closed = activation.moments(pairs)
    for rule in (infinite.series_moments, infinite.quadrature_moments):
        for a, b in zip(closed, rule(activation, pairs), strict=True):
            assert close(b, a, 1e-12), rule


def test_closed_forms_and_series_keep_small_covariances_beside_large_biases():
    """Entries of 1e-8 keep all digits beside a bias of 1, which would be lost if the bias were subtracted again."""
    x = 1e-4 * inputs(4)
    biased, plain = (kernels(x, activation="relu", depth=0, sigma_b=b, positions="all") for b in (1.0, 0.0))
    assert torch.equal(biased.propulsion, plain.propulsion)
    assert torch.equal(biased.ntk_weights, plain.nngp)


def relu_by_mpmath(x, x2, depth: int, sigma_w: float, sigma_b: float) -> tuple[float, float]:
    """(NTK, Propulsion on the hidden layers) with 50 digits, by the textbook formula with arccos."""
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
        # phi(0) = 0 for the whole table, so a network without biases has the output 0 at the input 0.
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
    # The distance is at least a tenth, so that these kernels cannot count as equal.
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
    """This is expected: h phi'(h) differs from phi(h), and the kernels differ at any width, even up to scale."""
    x = inputs()
    result = kernels(x, activation=name, positions=positions, sigma_b=0)
    assert ntk.kernel_distance(result.ntk, result.propulsion) > 0.03
    assert ntk.kernel_distance(result.ntk, result.propulsion, scaled=True) > 0.02


@pytest.mark.parametrize(("name", "sign"), [("erf", -1), ("tanh", -1), ("gelu", 1), ("silu", 1)])
def test_gap_on_the_diagonal_is_bounded_away_from_zero(name, sign):
    """It is zero for ReLU, negative for saturating activations and positive for the others."""
    x = inputs()
    layers = kernels(x, activation=name, depth=2).layers
    assert layers is not None
    gap = layers.gap.diagonal(dim1=1, dim2=2)
    share = (layers.weights + layers.biases)[:2].diagonal(dim1=1, dim2=2)
    assert float((sign * gap / share).min()) > 0.05


@pytest.mark.parametrize("name", NAMES)
def test_the_gap_is_the_covariance_layer_by_layer(name):
    """K_P,l / k^2 - K_F,l = sigma_w^2 D^{l+1} Cov(h h', phi' phi'), both sides computed independently if possible."""
    x = inputs()
    found = kernels(x, activation=name, degree=3, depth=4).layers
    other = kernels(x, activation=name, degree=3, depth=4, method="series").layers
    assert found is not None
    assert other is not None
    difference = found.propulsion / 9 - (found.weights + found.biases)[:4]
    assert close(difference, found.gap, 1e-12) or name == "linear"
    assert float((difference - other.gap).abs().max()) <= 1e-12 * float(found.weights.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_are_those_of_autograd_in_float64(name):
    activation = ACTIVATIONS[name]
    h = torch.linspace(-8, 8, 400, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(activation.function(h).sum(), h)
    torch.testing.assert_close(activation.derivative(h.detach()), expected, rtol=1e-13, atol=1e-14)


def test_linear_networks_have_no_gap():
    result = kernels(inputs(), activation="linear")
    layers = result.layers
    assert layers is not None
    assert close(layers.propulsion, (layers.weights + layers.biases)[:3], 1e-14)
    assert float(layers.gap.abs().max()) <= 1e-14 * float(layers.weights.max())


# --- random networks -------------------------------------------------------------------------------------------------


def multiplier_kernel(network: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    z = [p for name, p in network.named_parameters() if is_multiplier(name, p)]
    outputs, each = network(x)[:, 0], torch.eye(len(x), dtype=torch.float64)
    J = torch.cat(torch.autograd.grad(outputs, z, each, is_grads_batched=True), dim=1)
    return J @ J.T


def network(width: int, seed: int, activation, *, n_in: int = 5, depth: int = 2, multipliers="hidden") -> MLP:
    recipe = Recipe(
        generator=torch.Generator().manual_seed(seed), sigma_w=1.4, sigma_b=0.3, degree=3, multipliers=multipliers
    )
    return MLP(n_in, width=width, depth=depth, activation=activation, recipe=recipe)


WIDTHS = {64: 200, 256: 100, 1024: 30, 4096: 10}  # and networks of each


def test_networks_approach_the_limit_as_one_over_root_width():
    x = inputs(4)
    limits = {name: kernels(x, activation=name, depth=2, degree=3) for name in NAMES}
    errors: dict[str, dict[int, float]] = {name: {} for name in NAMES}
    means: dict[str, torch.Tensor] = {}
    for width, draws in WIDTHS.items():
        found: dict[str, list[torch.Tensor]] = {name: [] for name in NAMES}
        for seed in range(draws):
            net = network(width, seed, "linear")
            for name in NAMES:  # All have the same weights.
                net.phi = ACTIVATIONS[name].function
                found[name].append(multiplier_kernel(net, x))
        for name in NAMES:
            values = torch.stack(found[name])
            squares = (values - limits[name].propulsion).flatten(1).norm(dim=1).square()
            errors[name][width], means[name] = float(squares.mean().sqrt()), values.mean(dim=0)
    for name in NAMES:
        # Each width is weighted by the precision of its error.
        fit = np.polyfit(np.log(list(WIDTHS)), np.log(list(errors[name].values())), 1, w=np.sqrt(list(WIDTHS.values())))
        assert fit[0] == pytest.approx(-0.5, abs=0.1), name
        # At width 4096 the mean of the networks is within its standard error of the limit.
        limit, distance = limits[name].propulsion, float((means[name] - limits[name].propulsion).norm())
        assert distance < 3 * errors[name][4096] / math.sqrt(WIDTHS[4096]), name
        assert distance < 0.05 * float(limit.norm()), name
        # It is not at full fine-tuning's limit, since the gap does not close with the width.
        if name != "linear":
            assert float((means[name] - 9 * limits[name].ntk).norm()) > 3 * distance, name


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


def within(found: torch.Tensor, mean: torch.Tensor, errors: float = 4.0) -> bool:
    """Whether the average of draws (draws, n, n) is ``mean`` within so many standard errors."""
    error = found.std(dim=0) / math.sqrt(len(found))
    return bool(((found.mean(dim=0) - mean).abs() <= errors * error).all())


def test_the_input_position_settles_with_the_input_dimension_not_with_the_width():
    """The kernel of scales on the input is a sum of n_0 random terms, one for each coordinate."""
    spread, draws = {}, 200
    for n_in in (6, 96):
        x = inputs(2, n_in)
        limit = kernels(x, depth=1, degree=3).propulsion_input
        # The width is far above n_0, so that the width's fluctuation, of relative variance 6 / width, is negligible.
        found = torch.stack(
            [
                multiplier_kernel(network(4000, s, "relu", n_in=n_in, depth=1, multipliers=["input"]), x)
                for s in range(draws)
            ]
        )
        # The mean deviates from the limit by order 1 / n_0, which is below the standard error at 96.
        assert n_in == 6 or within(found, limit.mean)
        # 200 draws give the variance of such products to about 15 %, and corrections of order 1 / n_0 matter at 6.
        assert torch.allclose(found.var(0), limit.variance, rtol=0.5)
        spread[n_in] = float((found.var(0).diagonal().sqrt() / limit.mean.diagonal()).mean())
    assert spread[6] > 0.5
    assert spread[96] < 0.35


def test_the_readout_stays_random():
    x, draws = inputs(2), 600
    limit = kernels(x, depth=1, degree=3).propulsion_readout
    for width in (100, 1600):  # The variance does not change with the width.
        found = torch.stack(
            [multiplier_kernel(network(width, s, "relu", depth=1, multipliers=["readout"]), x) for s in range(draws)]
        )
        assert within(found, limit.mean)
        # f^2 has kurtosis 15, so 600 draws give its variance to sqrt(14 / 600) = 15 %.
        assert torch.allclose(found.var(0), limit.variance, rtol=0.45)
    with pytest.raises(ValueError, match="stays random at any width"):
        kernels(x, positions=[1, "readout"])


def test_lora_has_the_kernel_of_the_weights_on_average_with_the_variance_stated():
    x, rank, draws = inputs(2), 4, 2000
    limit = kernels(x, depth=1)
    net = network(4096, 0, "relu", depth=1, multipliers=())
    signals: list[torch.Tensor] = []
    handles = [layer.register_forward_hook(lambda m, a, y: signals.extend((a[0], y))) for layer in net.layers]
    outputs = net(x)[:, 0]
    for handle in handles:
        handle.remove()
    generator, found = torch.Generator().manual_seed(1), torch.zeros(draws, 2, 2, dtype=torch.float64)
    mean, variance = torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    for a, y in zip(signals[::2], signals[1::2], strict=True):
        g = torch.stack([torch.autograd.grad(o, y, retain_graph=True)[0][i] for i, o in enumerate(outputs)])
        a = 1.4 / math.sqrt(a.shape[1]) * a.detach()
        mean += (g @ g.T) * (a @ a.T)
        variance += (g @ g.T) ** 2 * ((a @ a.T).diagonal() * (a @ a.T).diagonal()[:, None] + (a @ a.T) ** 2) / rank
        # A acts through its products with the two inputs: Gaussian, of covariance a.a' / r.
        projected = torch.randn(draws, rank, 2, generator=generator, dtype=torch.float64)
        projected = projected @ torch.linalg.cholesky(a @ a.T).T / math.sqrt(rank)
        found += (g @ g.T) * (projected.transpose(1, 2) @ projected)
    # The mean is this network's kernel of the weights, within the error of the draws of A ...
    assert within(found, mean)
    assert torch.allclose(found.var(0), variance, rtol=0.25)
    # ... and of the limit, up to the network's own fluctuation, a few times 1 / sqrt(4096) = 1.6 %.
    assert close(mean, limit.lora, 0.08)
    assert close(variance, limit.lora_variance(rank), 0.16)
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
    if name == "erf":
        # In the chaotic phase distances between inputs and rounding errors grow; an input must stay equal to itself.
        chaotic = kernels(x, activation=name, depth=80, sigma_w=2.5, sigma_b=0.05, per_layer=False)
        assert torch.equal(chaotic.nngp[0, :2], chaotic.nngp.diagonal()[:2])
        assert float(chaotic.nngp[0, 5]) < 0.5 * float(chaotic.nngp[0, 0])
    critical = kernels(x, depth=300, sigma_w=2**0.5, sigma_b=0, per_layer=False)
    # He initialisation keeps the variance; each of 301 layers adds as much to the diagonal of the NTK.
    assert torch.allclose(critical.nngp.diagonal(), 2 * (x * x).mean(1), rtol=1e-12)
    assert torch.allclose(critical.ntk.diagonal(), 301 * critical.nngp.diagonal(), rtol=1e-12)


def test_thousands_of_inputs():
    x = inputs(1500)
    large = kernels(x, depth=2, activation="gelu", per_layer=False)
    small = kernels(x[:5], x[-7:], depth=2, activation="gelu")
    assert close(large.ntk[:5, -7:], small.ntk, 1e-13)
    assert close(large.propulsion[:5, -7:], small.propulsion, 1e-13)
    series = kernels(x[:400], depth=2, activation="silu", per_layer=False)
    assert close(series.ntk[:5, -7:], kernels(x[:5], x[393:400], depth=2, activation="silu").ntk, 1e-12)


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
    assert close(kernels(x, activation=torch.nn.functional.relu).ntk, kernels(x).ntk, 0)
    # A kink at 0 costs no accuracy: one layer has all digits.
    for name, kinked in {"relu": lambda h: h.clamp(min=0), "leaky_relu": lambda h: torch.maximum(h, h / 100)}.items():
        one, other = (
            kernels(hard_inputs(), activation=kinked, depth=1),
            kernels(hard_inputs(), activation=name, depth=1),
        )
        assert close(one.ntk, other.ntk, 1e-12)
        assert close(one.propulsion, other.propulsion, 1e-12)
    # E[sin sin'] = exp(-(q + q')/2) sinh(c)
    sine = kernels(x, activation=torch.sin, depth=1, sigma_w=1, sigma_b=0)
    c = x @ x.T / 5
    q = c.diagonal()
    assert close(sine.nngp, torch.exp(-(q + q[:, None]) / 2) * torch.sinh(c), 1e-13)


@pytest.mark.parametrize("q", [1e8, 1e20])
def test_slopes_of_gelu_at_opposite_inputs_of_large_variance(q):
    """phi'(-h) = 1 - phi'(h), so that E[phi'(h) phi'(-h)] = E[phi'(h)] - E[phi'(h)^2] = 1/2 - E[phi'(h)^2]."""
    variance, none = torch.tensor(q, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    opposite = infinite.Pairs(variance, variance, -variance, none + 2, none)
    with mpmath.workdps(60):
        v = mpmath.mpf(q)
        delta = 1 + 2 * v
        root = mpmath.sqrt(delta)
        square = mpmath.mpf(1) / 4 + (
            mpmath.atan(v / root) + v / root * (1 / delta + (1 - v**2) / (1 + v) ** 2 + 1)
        ) / (2 * mpmath.pi)
        expected = float(mpmath.mpf(1) / 2 - square)
    assert float(ACTIVATIONS["gelu"].moments(opposite).slopes) == pytest.approx(expected, abs=1e-15)


def exp_moments(q1, q2, c):
    size = mpmath.exp((q1 + q2) / 2 + c)
    return size, size, (c + (q1 + c) * (q2 + c)) * size


def sinh_moments(q1, q2, c):
    size = mpmath.exp((q1 + q2) / 2)
    plus, minus = ((c * s + (q1 + c * s) * (q2 + c * s)) * mpmath.exp(s * c) for s in (1, -1))
    return size * mpmath.sinh(c), size * mpmath.cosh(c), size * (plus - minus) / 2


@pytest.mark.parametrize(("function", "expected"), [(torch.exp, exp_moments), (torch.sinh, sinh_moments)])
@pytest.mark.parametrize("scale", [0.3, 1.0, 6.0, 7.7])
@pytest.mark.parametrize("rule", [infinite.series_moments, infinite.quadrature_moments])
def test_activations_that_grow_fast_are_right_far_from_the_mean(function, expected, scale, rule):
    """At a variance of 36 the mass of exp(h)^2 lies at 12 standard deviations."""
    x = scale * torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0], [1.0, 1e-4]], dtype=torch.float64)
    pairs = infinite.pairs_of_rows(x[:1], x)
    found = rule(infinite.from_function(function), pairs)
    for j in range(4):
        q1, q2, c = (mpmath.mpf(float(v)) for v in (pairs.q1[0, 0], pairs.q2[0, j], pairs.cov[0, j]))
        own1, own2 = expected(q1, q1, q1), expected(q2, q2, q2)
        for value, each, a, b in zip(found, expected(q1, q2, c), own1, own2, strict=True):
            assert abs(float(value[0, j]) - each) <= 1e-12 * mpmath.sqrt(a * b)


@pytest.mark.parametrize("method", ["series", "quadrature"])
@pytest.mark.parametrize("function", [torch.exp, torch.sinh, lambda h: torch.exp(h**2 / 400)])
def test_activations_that_grow_too_fast_are_refused(function, method):
    x = 10 * torch.eye(2, dtype=torch.float64) * math.sqrt(2)
    # The same activations at a variance of 1.
    assert float(kernels(x / 10, activation=function, depth=1, sigma_w=1.0, sigma_b=0.0, method=method).nngp[0, 0]) > 0
    with pytest.raises(infinite.ConvergenceError, match="grows too fast for a variance of"):
        kernels(x, activation=function, depth=1, sigma_w=1.0, sigma_b=0.0, method=method)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernels(X, activation=torch.sign), "has no usable derivative.*It jumps"),
        (lambda: kernels(X, activation=lambda h: torch.zeros_like(h) + 1), "autograd sees no dependence"),
        (lambda: kernels(X, activation=lambda h: h.sum()), "elementwise"),
        (lambda: kernels(X, activation="swish"), "activation must be one of 'linear'"),
        (lambda: kernels(X, activation=torch.nn.functional.hardtanh), r"do not converge: .* relative error of .*kink"),
        (lambda: kernels(X, activation=torch.nn.functional.hardtanh, method="quadrature"), "do not converge"),
        (lambda: kernels(X, activation=lambda h: torch.sin(300 * h), depth=1), "varies too fast"),
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


@pytest.mark.parametrize("sigma_b", [0.0, 0.4])
@pytest.mark.parametrize("activation", [name for name, a in ACTIVATIONS.items() if a.moments is not None])
def test_gradients_by_the_inputs_are_central_differences(activation, sigma_b):
    """Inputs include equal, nearly equal and opposite ones, and 0."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    x[2], x[3], x[4], x[5] = x[1], x[1] + 1e-9, -x[1], 0.0
    direction, h = torch.randn(6, 3, generator=generator, dtype=torch.float64), 1e-6
    # Equal inputs are shifted together, since the kernel of a kinked activation has a kink there; an input 0 stays.
    direction[2] = direction[3] = direction[1]
    direction[4], direction[5] = -direction[1], 0.0

    def kernels(z):
        found = mlp_kernels(z, depth=2, activation=activation, sigma_w=1.3, sigma_b=sigma_b)
        return {"nngp": found.nngp, "ntk": found.ntk, "propulsion": found.propulsion}

    leaf = x.clone().requires_grad_()
    after, before = kernels(x + h * direction), kernels(x - h * direction)
    for name, kernel in kernels(leaf).items():
        difference = (after[name] - before[name]) / (2 * h)
        for i, j in itertools.combinations_with_replacement(range(6), 2):
            (gradient,) = torch.autograd.grad(kernel[i, j], leaf, retain_graph=True)
            assert bool(torch.isfinite(gradient).all()), (name, i, j)
            assert abs(float((gradient * direction).sum() - difference[i, j])) < 1e-6 * float(kernel.abs().max()), (
                i,
                j,
            )


def test_second_derivatives_of_relu_kernels_away_from_equal_inputs():
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options = {"depth": 2, "activation": "relu", "sigma_w": 1.3, "sigma_b": 0.2}

    def entry(z):
        return mlp_kernels(z, **options).ntk[0, 1]

    assert torch.autograd.gradgradcheck(entry, (x.requires_grad_(),))


def test_residual_kernels_have_gradients():
    x = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[2] = x[1]
    direction, h = torch.ones_like(x), 1e-6
    options = {"depth": 3, "sigma_w": 1.3, "sigma_b": 0.2, "branch_scale": 0.5, "activation": "relu"}
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(infinite.residual_kernels(leaf, **options).ntk.sum(), leaf)
    after, before = (infinite.residual_kernels(x + s * h * direction, **options).ntk.sum() for s in (1, -1))
    assert float((gradient * direction).sum()) == pytest.approx(float(after - before) / (2 * h), rel=1e-6)


def test_series_say_that_they_have_no_gradients():
    x = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    for options in ({"activation": "tanh"}, {"activation": "relu", "method": "quadrature"}, {"activation": torch.sin}):
        with pytest.raises(NotImplementedError, match="no gradients in the inputs"):
            mlp_kernels(x, depth=1, sigma_w=1.0, sigma_b=0.0, **options)
        with torch.no_grad():
            mlp_kernels(x, depth=1, sigma_w=1.0, sigma_b=0.0, **options)
