"""Regression and gradient flow by products with an operator, against the same from the matrix."""

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import aslinearoperator
from torch import nn

import ntk
from ntk.dynamics import gradient_flow, kernel_regression

N, M, C = 30, 7, 2


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def kernels() -> dict:
    """A network's kernels of all outputs and of their sum, as matrices and operators, with new inputs against these."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, C)).double()
    x, new = random(N, 5), random(M, 5, seed=1)
    whole = ntk.empirical_ntk(model, x), ntk.empirical_ntk(model, new, x)
    shared = ntk.empirical_ntk(model, x, reduce="trace"), ntk.empirical_ntk(model, new, x, reduce="trace")
    return {
        "each output": (whole, (ntk.NTKOperator(model, x), ntk.NTKOperator(model, new, x))),
        "shared": (shared, tuple(aslinearoperator(K.numpy()) for K in shared)),
    }


@pytest.mark.parametrize("which", ["each output", "shared"])
def test_regression(kernels, which):
    (K, cross), (operator, cross_operator) = kernels[which]
    y, f0, f0_new = random(N, C, seed=2), random(N, C, seed=3), random(M, C, seed=4)
    size = float((y - f0).norm())
    own = float(torch.diagonal(K.flatten(2).sum(2) if K.ndim == 4 else K).max())
    for ridge in (1.0, 1e-3 * own):
        for tolerance in (1e-3, 1e-9):
            exact = kernel_regression(K, y, f0, ridge=ridge)
            found = kernel_regression(operator, y, f0, ridge=ridge, tolerance=tolerance)
            assert float((found - exact).norm()) <= tolerance * size
            exact = kernel_regression(K, y, f0, ridge=ridge, cross=cross, initial_cross=f0_new)
            for other in (cross, cross_operator):
                found = kernel_regression(
                    operator, y, f0, ridge=ridge, cross=other, initial_cross=f0_new, tolerance=tolerance
                )
                assert float((found - exact).abs().max()) <= tolerance * size * (2 * own / ridge) ** 0.5


@pytest.mark.parametrize("which", ["each output", "shared"])
def test_flow(kernels, which):
    (K, cross), (operator, cross_operator) = kernels[which]
    y, f0, f0_new = random(N, C, seed=2), random(N, C, seed=3), random(M, C, seed=4)
    size, times = float((y - f0).norm()), [0.3, 0.0, 1e-3, 2.0]
    for tolerance in (1e-3, 1e-9):
        exact = gradient_flow(K, y, f0, times=times)
        found = gradient_flow(operator, y, f0, times=times, tolerance=tolerance)
        assert float((found - exact).flatten(1).norm(dim=1).max()) <= tolerance * size
        torch.testing.assert_close(found[1], f0)
        exact = gradient_flow(K, y, f0, times=times, cross=cross, initial_cross=f0_new)
        found = gradient_flow(
            operator, y, f0, times=times, cross=cross_operator, initial_cross=f0_new, tolerance=tolerance
        )
        assert float((found - exact).abs().max()) <= tolerance * size * (2 * 2 * float(K.abs().max())) ** 0.5


def test_the_bounds_hold_for_a_small_space():
    """With few products the error is large, and never above what is reported."""
    values = np.geomspace(1e-3, 1, 80)
    Q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((80, 80)))
    A, y = (Q * values) @ Q.T, random(80, 1)
    for m in (8, 12, 16):
        with pytest.raises(ArithmeticError, match=f"after {m} products the error bound is") as found:
            gradient_flow(aslinearoperator(A), y, times=[30.0], products=m)
        bound = float(str(found.value).partition("error bound is ")[2].split()[0])
        exact = gradient_flow(torch.from_numpy(A), y, times=[30.0])
        # The same space is enough if the tolerance is twice the bound, and the error is below it.
        reached = gradient_flow(aslinearoperator(A), y, times=[30.0], products=m, tolerance=2.2 * bound)
        assert float((reached - exact).norm()) <= 1.1 * bound * float(y.norm())


def test_what_is_refused(kernels):
    operator, y = kernels["each output"][1][0], random(N, C)
    with pytest.raises(ValueError, match="needs a ridge above 0"):
        kernel_regression(operator, y)
    with pytest.raises(ValueError, match=r"expected an operator of shape \(40, 40\)"):
        kernel_regression(operator, y[:20], ridge=1.0)
    with pytest.raises(ValueError, match="expected a cross kernel of new inputs"):
        kernel_regression(operator, y, ridge=1.0, cross=random(3, 5))
    with pytest.raises(ValueError, match="tolerance must lie between 0 and 1"):
        gradient_flow(operator, y, times=[1.0], tolerance=0.0)
    with pytest.raises(ValueError, match="times must be finite"):
        gradient_flow(operator, y, times=[-1.0])
    with pytest.raises(ArithmeticError, match="more products="):
        kernel_regression(operator, y, ridge=1e-9, products=3)
    # Products in low precision do not reach a small tolerance, however many they are.
    coarse = ntk.NTKOperator(nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, C)), random(N, 5).float())
    with pytest.raises(ArithmeticError, match="products in float32 are not exact enough"):
        kernel_regression(coarse, y, ridge=1e-4, tolerance=1e-9)
    assert kernel_regression(coarse, y, ridge=1.0, tolerance=1e-3).isfinite().all()
