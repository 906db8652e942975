"""Random estimates of traces, diagonals and spectra, and Lanczos' recurrence, against the matrix itself."""

import numpy as np
import pytest
from scipy.sparse.linalg import aslinearoperator

import ntk
from ntk.krylov import lanczos

ROWS = 120
SPECTRA = {
    "power": 1 / np.arange(1, ROWS + 1.0) ** 1.5,
    "flat": np.linspace(0.5, 1.5, ROWS),
    "geometric": 0.8 ** np.arange(ROWS),
    "low rank": np.r_[np.ones(5), np.zeros(ROWS - 5)],
}


def matrix(values, seed: int = 0) -> np.ndarray:
    Q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(values), len(values))))
    return (Q * values) @ Q.T


@pytest.mark.parametrize("name", SPECTRA)
def test_intervals_of_the_trace_and_the_diagonal(name):
    A, trace = matrix(SPECTRA[name]), SPECTRA[name].sum()
    inside, errors, of_entries = [], [], []
    for seed in range(60):
        found = ntk.stochastic_trace(aslinearoperator(A), products=36, seed=seed)
        lower, upper = found.interval()
        inside.append(lower - 1e-12 <= trace <= upper + 1e-12)
        errors.append(found.value - trace)
        lower, upper = ntk.stochastic_diagonal(A, products=36, seed=seed).interval()
        of_entries.append(np.mean((lower - 1e-12 <= A.diagonal()) & (A.diagonal() <= upper + 1e-12)))
    assert np.mean(inside) >= 0.85  # 95 % of 60 is within 51 to 60 except once in 10,000 times
    assert np.mean(of_entries) >= 0.93
    # Three standard errors of the mean: the estimate is unbiased.
    assert abs(np.mean(errors)) <= 3 * np.std(errors) / np.sqrt(len(errors)) + 1e-12
    if name == "low rank":  # 12 random vectors span it
        np.testing.assert_allclose(errors, 0, atol=1e-12)


def test_more_products_than_rows_are_exact():
    A = matrix(SPECTRA["flat"][:20])
    found = ntk.stochastic_trace(A, products=30)
    assert found.value == pytest.approx(np.trace(A), rel=1e-13)
    assert found.interval() == (found.value, found.value)
    np.testing.assert_allclose(ntk.stochastic_diagonal(A, products=30).value, A.diagonal(), rtol=1e-13)


def test_lanczos_gives_a_basis_with_a_tridiagonal_matrix():
    A = matrix(SPECTRA["geometric"])
    B = np.random.default_rng(1).standard_normal((ROWS, 3))
    B[:, 2] = 0
    found = lanczos(aslinearoperator(A), B, 25)
    for j in (0, 1):
        V = found.basis[j].T
        T = np.diag(found.alpha[j]) + np.diag(found.beta[j, :-1], 1) + np.diag(found.beta[j, :-1], -1)
        np.testing.assert_allclose(V.T @ V, np.eye(25), atol=1e-12)
        np.testing.assert_allclose(V.T @ A @ V, T, atol=1e-12)
        np.testing.assert_allclose(np.linalg.norm(A @ V - V @ T), found.beta[j, -1], atol=1e-12)
    exact = lanczos(aslinearoperator(A), B, ROWS).applied(np.exp)
    values, vectors = np.linalg.eigh(A)
    np.testing.assert_allclose(exact, (vectors * np.exp(values)) @ (vectors.T @ B), atol=1e-10)


def test_an_invariant_space_ends_the_recurrence():
    A = matrix(SPECTRA["low rank"])
    found = lanczos(aslinearoperator(A), np.random.default_rng(0).standard_normal((ROWS, 2)), 50)
    assert found.alpha.shape[1] <= 3  # two eigenvalues
    assert not found.beta[:, -1].any()


@pytest.mark.parametrize("name", SPECTRA)
def test_spectral_density(name):
    values = SPECTRA[name]
    found = ntk.spectral_density(matrix(values), probes=10, steps=30, seed=3)
    np.testing.assert_allclose(found.weights.sum(axis=1), ROWS, rtol=1e-10)
    for function in (np.abs, np.square, lambda x: np.exp(-x)):
        estimate = found.trace(function)
        assert abs(estimate.value - function(values).sum()) <= 4 * estimate.standard_error + 1e-10
    at = np.linspace(-0.5, 2, 7)
    exact = (np.exp(-(((at[:, None] - values) / 0.3) ** 2) / 2) / (0.3 * np.sqrt(2 * np.pi))).sum(axis=1)
    estimate = found.density(at, 0.3)
    assert (np.abs(estimate.value - exact) <= 4 * estimate.standard_error + 1e-2).all()
    threshold = values[ROWS // 3]
    estimate = found.count(threshold * (1 - 1e-9))
    exact = (values >= threshold * (1 - 1e-9)).sum()
    assert abs(estimate.value - exact) <= 4 * estimate.standard_error + ROWS / 30


def test_of_a_kernel():
    import torch
    from torch import nn

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 30), nn.Tanh(), nn.Linear(30, 2)).double(), torch.randn(25, 4).double()
    operator = ntk.NTKOperator(model, x)
    values = np.linalg.eigvalsh(ntk.flatten(ntk.empirical_ntk(model, x)))
    trace = ntk.stochastic_trace(operator, products=24)
    assert abs(trace.value - operator.trace()) <= 5 * trace.standard_error
    found = ntk.spectral_density(operator, probes=6, steps=50)
    rank = found.trace(lambda v: v / (v + 1.0))
    assert abs(rank.value - (values / (values + 1)).sum()) <= 5 * rank.standard_error


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ntk.stochastic_trace(np.ones((4, 3))), "expected a square operator"),
        (lambda: ntk.stochastic_trace(np.eye(90), products=20), "products must be a multiple of 3"),
        (lambda: ntk.stochastic_diagonal(np.full((90, 90), np.nan), products=6), "NaN or infinite"),
        (lambda: ntk.stochastic_trace(np.eye(9)).interval(2), "confidence must lie between 0 and 1"),
        (lambda: ntk.spectral_density(np.eye(9), probes=1), "take at least 2"),
        (lambda: ntk.spectral_density(np.eye(9), steps=0), "steps must be at least 1"),
        (lambda: ntk.spectral_density(np.eye(9)).density(np.zeros(1), 0), "width must be positive"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
