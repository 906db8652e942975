"""Every function that takes a kernel, outputs or inputs: what it refuses, and results at the edges of float64."""

import math
from types import SimpleNamespace

import jaxtyping
import mpmath
import pytest
import torch
from torch import nn

import ntk
from ntk import adapters, bounds, dynamics, infinite
from ntk.infinite.networks import Recipe, ResidualMLP

SCALES = (2.0**-1000, 1e-200, 1e155, 2.0**1000)


@pytest.fixture(autouse=True)
def _without_the_type_checker():
    """The shapes in annotations refuse complex numbers as well, but users do not run that check."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def gram(seed: int = 0, n: int = 4) -> torch.Tensor:
    J = torch.randn(n, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return J @ J.T


K, Y = gram(), torch.randn(4, 2, generator=generator(), dtype=torch.float64)
Y1 = Y[:, 0]

# Functions of one kernel, or of other numbers, which must be real and finite.
OF_NUMBERS = {
    "kernel_distance": lambda A: ntk.kernel_distance(A, K),
    "kernel_distance, second": lambda A: ntk.kernel_distance(K, A, scaled=True),
    "best_scale": lambda A: ntk.best_scale(A, K),
    "kernel_alignment": lambda A: ntk.kernel_alignment(K, A),
    "cka": lambda A: ntk.cka(A, K),
    "center": ntk.center,
    "trace": ntk.trace,
    "trace_ratio": lambda A: ntk.trace_ratio(K, A),
    "matching_degree": lambda A: ntk.matching_degree(A, K),
    "spectrum": ntk.spectrum,
    "effective_rank": ntk.effective_rank,
    "principal_angles": lambda A: ntk.principal_angles(A, K, 2),
    "eigenspace_overlap": lambda A: ntk.eigenspace_overlap(K, A, 2),
    "gaussian_sketch": lambda A: ntk.gaussian_sketch(A, 3, generator=generator()),
    "permuted": lambda A: ntk.permuted(A, generator=generator()),
    "kernel_variance": lambda A: bounds.kernel_variance(A, 3),
    "projection_variance": lambda A: bounds.projection_variance(A[0], K[0], 3),
    "simulate": lambda A: bounds.simulate(K[0], A[0], 3, draws=2, generator=generator()),
    "Spectrum": dynamics.Spectrum,
    "kernel_regression": lambda A: dynamics.kernel_regression(A, Y),
    "kernel_regression, targets": lambda A: dynamics.kernel_regression(K, A[:, :2]),
    "kernel_regression, initial": lambda A: dynamics.kernel_regression(K, Y, A[:, :2]),
    "kernel_regression, cross": lambda A: dynamics.kernel_regression(K, Y, cross=A),
    "kernel_regression, initial_cross": lambda A: dynamics.kernel_regression(K, Y, cross=K, initial_cross=A[:, :2]),
    "gradient_flow": lambda A: dynamics.gradient_flow(A, Y, times=[1.0]),
    "gradient_flow, targets": lambda A: dynamics.gradient_flow(K, A, times=[1.0]),
    "gradient_flow, cross": lambda A: dynamics.gradient_flow(K, Y, times=[1.0], cross=A),
    "cross_entropy_flow": lambda A: dynamics.cross_entropy_flow(A, torch.zeros(4).long(), Y, times=[1.0]),
    "cross_entropy_flow, labels": lambda A: dynamics.cross_entropy_flow(K, A, K, times=[1.0]),
    "cross_entropy_flow, initial": lambda A: dynamics.cross_entropy_flow(K, torch.zeros(4).long(), A, times=[1.0]),
    "sign_gradient_kernel": lambda A: dynamics.sign_gradient_kernel(A[None], K[None]),
    "sign_gradient_kernel, second": lambda A: dynamics.sign_gradient_kernel(K[None], A[None]),
    "relative_drift": lambda A: dynamics.relative_drift(A, K),
    "relative_drift, start": lambda A: dynamics.relative_drift(K, A),
    "linearization_error": lambda A: dynamics.linearization_error(A, K, 2 * K),
    "linearization_error, linearized": lambda A: dynamics.linearization_error(K, A, 2 * K),
    "sign_gradient_regression": lambda A: regression(A),
    "sign_gradient_regression, targets": lambda A: regression(K, targets=A[0]),
    "sign_gradient_regression, cross": lambda A: regression(K, cross=A),
    "mlp_kernels": lambda A: mlp(A),
    "mlp_kernels, second": lambda A: mlp(K, A),
    "residual_kernels": lambda A: residual(A),
    "plane_moments": lambda A: infinite.plane_moments(infinite.ACTIVATIONS["tanh"], A[0], K[0], K[0]),
}


def regression(kernel, **changes):
    given = {"targets": Y1, "initial": Y1, "cross": K, "initial_cross": Y1, "ridge": 0.1} | changes
    return ntk.sign_gradient_regression(kernel, given.pop("targets"), given.pop("initial"), **given)


def mlp(x, x2=None, **changes):
    return infinite.mlp_kernels(x, x2, **{"depth": 2, "activation": "relu", "sigma_w": 1.0, "sigma_b": 0.0} | changes)


def residual(x=K, **changes):
    return infinite.residual_kernels(x, **{"depth": 2, "activation": "relu", "sigma_w": 1.0} | changes)


def nearly_constant(dtype):
    """A kernel of which centring leaves the rounding of one entry."""
    kernel = torch.full((4, 4), 0.7, dtype=dtype)
    kernel[0, 0] = torch.nextafter(kernel[0, 0], torch.ones((), dtype=dtype))
    return kernel


def residual_network(branch_scale):
    recipe = Recipe(generator=generator())
    return ResidualMLP(2, width=2, depth=1, activation="relu", recipe=recipe, branch_scale=branch_scale)


@pytest.mark.parametrize("function", OF_NUMBERS.values(), ids=list(OF_NUMBERS))
def test_complex_and_missing_numbers_are_refused(function):
    with pytest.raises(ValueError, match=r"must be real; got torch\.complex128"):
        function(K + 1j)
    for wrong in (math.nan, math.inf):
        broken = K.clone()
        broken[0, 0] = broken[1, 1] = wrong
        with pytest.raises(ValueError, match=r"holds NaN or infinite values"):
            function(broken)


SYMMETRIC = (
    "spectrum", "effective_rank", "principal_angles", "eigenspace_overlap", "gaussian_sketch", "Spectrum",
    "kernel_regression", "gradient_flow", "cross_entropy_flow",
)  # fmt: skip


@pytest.mark.parametrize("name", SYMMETRIC)
def test_asymmetric_kernels_are_refused_and_rounding_is_not(name):
    asymmetric, rounded = K.clone(), K.clone()
    asymmetric[0, 1] += 0.01
    rounded[0, 1] *= 1 + 1e-15
    OF_NUMBERS[name](rounded)
    with pytest.raises(ValueError, match="expected a symmetric kernel"):
        OF_NUMBERS[name](asymmetric)
    with pytest.raises(ValueError, match=r"expected a square kernel|must have the same shape"):
        OF_NUMBERS[name](K[:, :3])


def test_what_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match=r"must be a torch tensor; got list"):
        ntk.spectrum(K.tolist())


# --- scales ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
def test_metrics_without_a_unit_are_the_same_at_every_scale(scale):
    other = gram(1)
    for metric in (ntk.kernel_alignment, ntk.cka, lambda a, b: ntk.kernel_distance(a, b, scaled=True)):
        assert metric(scale * K, other) == pytest.approx(metric(K, other), rel=1e-14)
        assert metric(other, scale * K) == pytest.approx(metric(other, K), rel=1e-14)
    for metric in (ntk.kernel_distance, ntk.trace_ratio, ntk.matching_degree, ntk.best_scale):
        assert metric(scale * K, scale * other) == pytest.approx(metric(K, other), rel=1e-14)
    assert ntk.effective_rank(scale * K) == pytest.approx(ntk.effective_rank(K), rel=1e-13)
    torch.testing.assert_close(ntk.principal_angles(scale * K, other, 2), ntk.principal_angles(K, other, 2))
    assert dynamics.relative_drift(scale * other, scale * K) == pytest.approx(dynamics.relative_drift(other, K))
    moved = (scale * K, scale * other, scale * gram(2))
    assert dynamics.linearization_error(*moved) == pytest.approx(dynamics.linearization_error(K, other, gram(2)))


@pytest.mark.parametrize("scale", SCALES)
def test_metrics_with_the_unit_of_the_kernel_follow_its_scale(scale):
    other = gram(1)
    for metric in (ntk.trace, ntk.spectrum, ntk.center):
        found, expected = torch.as_tensor(metric(scale * K)), scale * torch.as_tensor(metric(K))
        torch.testing.assert_close(found, expected, atol=0, rtol=1e-13)
    for kind in ("mean_absolute", "max_absolute"):
        found = ntk.kernel_distance(scale * K, scale * other, kind=kind)
        assert found == pytest.approx(scale * ntk.kernel_distance(K, other, kind=kind), rel=1e-14)
    assert ntk.best_scale(scale * K, other) == pytest.approx(scale * ntk.best_scale(K, other), rel=1e-14)


def test_distances_of_kernels_of_very_different_scale():
    small, large = torch.diag(torch.tensor([3e-200, 4e-200], dtype=torch.float64)), torch.eye(2, dtype=torch.float64)
    with mpmath.workdps(30):
        expected = mpmath.sqrt(2) / mpmath.mpf("5e-200")
    assert ntk.kernel_distance(small, large) == pytest.approx(float(expected), rel=1e-14)
    assert ntk.kernel_distance(large, small) == pytest.approx(1, rel=1e-15)
    entries = torch.tensor([[1.0, 1e-200], [1e-200, 1.0]], dtype=torch.float64)
    assert ntk.kernel_distance(entries, large) == pytest.approx(1e-200, rel=1e-14)
    huge = torch.full((2, 2), 1.5e308, dtype=torch.float64)
    assert ntk.kernel_distance(huge, -huge) == 2
    with pytest.raises(OverflowError, match="max_absolute is about 1e\\+308"):
        ntk.kernel_distance(huge, -huge, kind="max_absolute")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ntk.best_scale(1e200 * K, 1e-200 * K), "best scale is about 1e"),
        (lambda: ntk.trace_ratio(1e-200 * K, 1e200 * K), "ratio of the traces is about 1e-400"),
        (lambda: ntk.trace(torch.full((2, 2), 1e308, dtype=torch.float64)), "trace is about"),
        (lambda: ntk.spectrum(torch.full((2, 2), 1e308, dtype=torch.float64)), "eigenvalues overflow"),
        (lambda: ntk.kernel_distance(1e-200 * K, 1e200 * K), "relative distance is about 1e"),
        (lambda: bounds.kernel_variance(1e200 * K, 3), "variances of the entries overflow"),
        (lambda: bounds.projection_variance(1e200 * Y1, Y1, 3), "variance and its terms overflow"),
        (lambda: dynamics.relative_drift(1e200 * K, 1e-200 * K), "relative drift is about 1e"),
        (lambda: dynamics.kernel_regression(K, 1e308 * Y.sign(), cross=1e9 * K), "predicted outputs overflow"),
        (lambda: dynamics.gradient_flow(K, 1e308 * Y.sign(), times=[1.0], cross=1e9 * K), "predicted outputs overflow"),
        (lambda: regression(K, cross=1e308 * K.sign(), targets=1e3 * Y1), "predictions overflow"),
        (lambda: dynamics.sign_gradient_kernel(torch.full((1, 1, 9), 3e4).half()), "overflow torch.float16"),
        (lambda: mlp(1e200 * K), "covariances of pre-activations overflow"),
        (lambda: mlp(K, depth=500, sigma_w=10.0), "covariances of pre-activations overflow"),
        (lambda: mlp(K, degree=1e200), "powers of degree"),
        (lambda: mlp(K, sigma_w=1e-200), "powers of sigma_w"),
        (lambda: mlp(K, degree=1e65, sigma_w=1e30, depth=1), r"kernels \(\w+\) overflow"),
        (lambda: mlp(1e60 * K, activation="gelu", depth=1), "overflow"),
        (lambda: mlp(1e-200 * K), "underflows"),
        (lambda: mlp(K, depth=500, sigma_w=0.01), "underflows"),
        (lambda: residual(depth=500, sigma_w=10.0), "overflow"),
        (lambda: infinite.pairs_of_rows(1e200 * K, K), "overflow"),
    ],
)  # fmt: skip
def test_results_beyond_the_range_of_float64_raise(call, message):
    with pytest.raises(OverflowError, match=message):
        call()


def test_correlations_of_inputs_near_the_edges_keep_their_digits():
    expected = infinite.pairs_of_rows(K, K)
    for scale in (2.0**-500, 2.0**500):
        found = infinite.pairs_of_rows(scale * K, scale * K)
        torch.testing.assert_close(found.minus, expected.minus, rtol=1e-15, atol=0)
        found = infinite.pairs_of_rows(scale * K, K / scale)
        torch.testing.assert_close(found.minus, expected.minus, rtol=1e-13, atol=1e-30)


# --- single values that mean nothing ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: residual(branch_scale=math.nan), "branch_scale must be finite"),
        (lambda: residual_network(branch_scale=math.inf), "branch_scale must be finite"),
        (lambda: Recipe(generator=generator(), degree=math.nan), "degree must be finite"),
        (lambda: infinite.leaky_relu(1e200), "must be finite, below 1e.70"),
        (lambda: mlp(K).lora_variance(math.nan), "rank must be at least 1, whole"),
        (lambda: bounds.variance(math.nan, 0.5), "at least 1, whole and finite"),
        (lambda: bounds.tail(math.inf, 0.5, 0.5), "at least 1, whole and finite"),
        (lambda: bounds.variance(2.5, 0.5), "at least 1, whole and finite"),
        (lambda: bounds.clopper_pearson(2.5, 10), "whole numbers"),
        (lambda: adapters.Propulsion(degree=math.nan), "degree of Propulsion must be finite"),
        (lambda: adapters.LoRA(alpha=math.inf), "alpha must be finite"),
        (lambda: adapters.LoRA(a={"q": K + 1j}), "matrix A of q must be real"),
        (lambda: adapters.DoRA(a={"q": K * math.nan}), "matrix A of q holds NaN"),
        (lambda: adapters.VeRA(K + 1j, K), "matrix a of VeRA must be real"),
        (lambda: adapters.VeRA(K, K, math.nan), "initial value of VeRA's d must be finite"),
        (lambda: adapters.LoHa(rank=0), "rank of LoHa must be at least 1"),
        (lambda: adapters.LoHa(alpha=math.nan), "alpha must be finite"),
        (lambda: adapters.LoHa(factors={"q": (K, K, K + 1j)}), "factor of q must be real"),
        (lambda: adapters.RandomSubset(0), "count of RandomSubset must be at least 1"),
        (lambda: dynamics.cross_entropy_flow(K, torch.tensor([0.7, 0.0, 1.0, 0.0]), Y, times=[1.0]), "integer dtype"),
        (lambda: dynamics.cross_entropy_flow(K, torch.tensor([0, 1, 2, 0]), Y, times=[1.0]), "classes from 0 to 1"),
        (lambda: dynamics.cross_entropy_flow(K, torch.tensor([0, 1, -100, 0]), Y, times=[1.0]), "classes from 0 to 1"),
        (lambda: dynamics.cross_entropy_flow(K, torch.full((4, 2), 0.7), Y, times=[1.0]), "rows sum to 1"),
        (lambda: dynamics.cross_entropy_flow(K, torch.tensor([[1.5, -0.5]] * 4), Y, times=[1.0]), "rows sum to 1"),
        (lambda: dynamics.cross_entropy_flow(K, torch.zeros(4).long(), Y, times=[1.0], tolerance=0), "tolerance"),
        (lambda: dynamics.linearization_error(K, K[:2], K), "one shape"),
        (lambda: ntk.matching_degree(K, -K), "not negative"),
        (lambda: ntk.gaussian_sketch(-K, 3, generator=generator()), "not positive semi-definite"),
        (lambda: ntk.permuted(torch.ones(3, 5), generator=generator()), "examples with themselves"),
        (lambda: ntk.cka(nearly_constant(torch.float64), K), "K1 .*constant after centring"),
        (lambda: ntk.cka(K, nearly_constant(torch.float32)), "K2 .*constant after centring"),
    ],
)  # fmt: skip
def test_values_without_a_meaning_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_nearly_singular_sign_gradient_kernels_are_refused():
    """Not only those in which elimination meets an exact zero."""
    A = torch.tensor([[0.1, 0.3, 0.5]], dtype=torch.float64)
    singular = A.T @ A
    with pytest.raises(ArithmeticError, match="singular up to rounding"):
        ntk.sign_gradient_regression(singular, A[0], A[0] * 0, cross=singular, initial_cross=A[0] * 0, ridge=0)
    regression(K)


@pytest.mark.parametrize("scale", [1e-100, 1e14, 1e100])
def test_logits_of_a_kernel_in_another_unit_are_those_at_times_in_its_inverse(scale):
    """The integrator's absolute tolerance must not exceed the coefficients of a large kernel."""
    labels = torch.tensor([0, 1, 1, 0])
    options = {"initial_cross": Y, "cross": K}
    expected = dynamics.cross_entropy_flow(K, labels, Y, times=[0.1, 3.0], **options)
    options["cross"] = scale * K
    found = dynamics.cross_entropy_flow(scale * K, labels, Y, times=[0.1 / scale, 3.0 / scale], **options)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_dimensions_at_the_edges():
    with pytest.raises(ValueError, match="take more than"):
        bounds.dimension_needed(1e-200, 0.9)
    with pytest.raises(ValueError, match="entries must be at least 1"):
        bounds.dimension_needed(0.1, 0.9, entries=math.nan)
    for d in (10, 10**5):
        assert bounds.tail(d, 1e200, 0.5) == 0
        assert bounds.tail(d, 1e-200, 0.5) == pytest.approx(1, rel=1e-14)
    with pytest.raises(ValueError, match="not positive semi-definite"):
        bounds.kernel_variance(1e-200 * torch.tensor([[1.0, 5.0], [5.0, 1.0]], dtype=torch.float64), 3)


def test_products_that_overflow_do_not_count_as_converged():
    """Each factor is finite: its square with the weight of the normal distribution is, the square alone is not."""
    activation = infinite.from_function(lambda h: 1e160 * torch.tanh(h))
    one = torch.ones(1, dtype=torch.float64)
    with pytest.raises(infinite.ConvergenceError):
        infinite.plane_moments(activation, one, one, one)


def test_the_linearised_model_refuses_parameters_that_are_not_finite():
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.bias[0] = math.nan
    with pytest.raises(ValueError, match="parameter bias holds NaN"):
        dynamics.Linearized(layer)
    dynamics.Linearized(layer, lambda name, _: name == "weight")


# --- eigenspaces -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("angle", [1e-12, 1e-9, 1e-5, 1.0, math.pi / 2 - 1e-9])
def test_small_angles_between_eigenspaces_keep_their_digits(angle):
    Q = torch.linalg.qr(torch.randn(5, 5, generator=generator(), dtype=torch.float64)).Q
    turned = Q.clone()
    turned[:, 1] = math.cos(angle) * Q[:, 1] + math.sin(angle) * Q[:, 4]
    turned[:, 4] = -math.sin(angle) * Q[:, 1] + math.cos(angle) * Q[:, 4]
    eigenvalues = torch.tensor([9.0, 7.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    found = ntk.principal_angles((Q * eigenvalues) @ Q.T, (turned * eigenvalues) @ turned.T, 2)
    assert found.tolist() == pytest.approx([0, angle], abs=1e-14)


def test_eigenspaces_that_ties_leave_open_are_undefined():
    tied, distinct = torch.eye(3, dtype=torch.float64), torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    for pair in ((tied, distinct), (distinct, tied)):
        with pytest.raises(ntk.UndefinedMetricError, match=r"eigenvalues 1 and 2 .*equal up to rounding"):
            ntk.eigenspace_overlap(*pair, 1)
        assert ntk.eigenspace_overlap(*pair, 3) == pytest.approx(1)
    # Ties among the chosen eigenvectors leave their span as it is.
    assert ntk.eigenspace_overlap(torch.diag(torch.tensor([0.0, 2.0, 2.0])), distinct, 2) == pytest.approx(1)
    # Single precision cannot tell these two apart.
    close = torch.diag(torch.tensor([1.0, 2.0, 2.0 + 2**-22]))
    with pytest.raises(ntk.UndefinedMetricError, match="equal up to rounding"):
        ntk.eigenspace_overlap(close, close, 1)
    assert ntk.eigenspace_overlap(close.double(), close.double(), 1) == pytest.approx(1)


# --- precision of null models ----------------------------------------------------------------------------------------


def test_null_models_are_formed_in_a_precision_that_holds_them():
    sketch = ntk.gaussian_sketch(torch.eye(2, dtype=torch.int64), 3, generator=generator())
    expected = ntk.gaussian_sketch(torch.eye(2, dtype=torch.float64), 3, generator=generator())
    assert torch.equal(sketch, expected)
    with pytest.raises(OverflowError, match=r"overflow torch\.float16"):
        ntk.gaussian_sketch(torch.diag(torch.tensor([6e4, 6e4])).half(), 1, generator=generator())
    layer = nn.Linear(1, 1, bias=False).half()
    (kernel,) = ntk.random_subset_ntk(layer, torch.tensor([[300.0]]).half(), 1, generator=generator())
    assert float(kernel.squeeze()) == 9e4
    assert float(ntk.hidden_state_kernel(Stated(), {"x": torch.tensor([[300.0]]).half()})) == 9e4


class Stated(nn.Module):
    """Returns its input as its last hidden state, in half precision."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1).half())

    def forward(self, x, output_hidden_states):
        return SimpleNamespace(hidden_states=[x[:, None]])
