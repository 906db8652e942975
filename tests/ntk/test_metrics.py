"""Kernel metrics on planted kernels, whose values are known by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ntk


def gram(n: int, p: int, seed: int, c: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if c is None:
        J = torch.randn(n, p, generator=generator, dtype=torch.float64)
        return J @ J.T
    J = torch.randn(n, c, p, generator=generator, dtype=torch.float64)
    return torch.einsum("iap,jbp->ijab", J, J)


def test_distances_by_hand():
    K1, K2 = torch.tensor([[4.0, 0.0], [0.0, 3.0]]), torch.tensor([[1.0, 2.0], [2.0, 3.0]])
    assert ntk.kernel_distance(K1, K2, kind="max_absolute") == 3
    assert ntk.kernel_distance(K1, K2, kind="mean_absolute") == (3 + 2 + 2 + 0) / 4
    assert ntk.kernel_distance(K1, K2) == pytest.approx(math.sqrt(9 + 4 + 4) / 5)
    assert ntk.best_scale(K1, K2) == pytest.approx((4 + 9) / (1 + 4 + 4 + 9))
    assert ntk.kernel_alignment(K1, K2) == pytest.approx(13 / (5 * math.sqrt(18)))
    assert ntk.trace_ratio(K1, K2) == pytest.approx(7 / 4)
    assert ntk.matching_degree(K1, K2) == pytest.approx(math.sqrt(7 / 4))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 6), p=st.integers(1, 9), scale=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_alignments_ignore_scale_and_distances_after_scale_follow_from_them(n, p, scale, seed):
    K1, K2 = gram(n, p, seed), gram(n, p + 1, seed + 100)
    for alignment in (ntk.kernel_alignment, ntk.cka):
        assert alignment(K1, scale * K1) == pytest.approx(1)
        assert alignment(K1, K2) == pytest.approx(alignment(scale * K2, K1))
        assert -1e-12 <= alignment(K1, K2) <= 1 + 1e-12
    scaled = ntk.kernel_distance(K1, scale * K2, scaled=True)
    assert scaled == pytest.approx(math.sqrt(1 - ntk.kernel_alignment(K1, K2) ** 2))
    assert scaled <= ntk.kernel_distance(K1, scale * K2) + 1e-12


def test_cka_forgets_a_constant_and_matches_centred_features():
    K1, K2 = gram(5, 3, 0), gram(5, 4, 1)
    assert ntk.cka(K1 + 7.0, K2) == pytest.approx(ntk.cka(K1, K2))
    assert ntk.kernel_alignment(K1 + 7.0, K2) != pytest.approx(ntk.kernel_alignment(K1, K2), abs=0.01)
    J = torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    centred = J - J.mean(dim=0)
    expected = torch.einsum("iap,jbp->ijab", centred, centred)
    assert torch.allclose(ntk.center(torch.einsum("iap,jbp->ijab", J, J)), expected, atol=1e-14)


def test_four_dimensional_kernels_are_their_flattened_matrices():
    K1, K2 = gram(4, 3, 0, c=2), gram(4, 5, 1, c=2)
    M1, M2 = ntk.flatten(K1), ntk.flatten(K2)
    for metric in (ntk.kernel_alignment, ntk.kernel_distance, ntk.best_scale, ntk.trace_ratio):
        assert metric(K1, K2) == pytest.approx(metric(M1, M2))
    assert torch.allclose(ntk.spectrum(K1), ntk.spectrum(M1))


def test_spectrum_and_effective_rank():
    Q = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    eigenvalues = torch.tensor([8.0, 4.0, 2.0, 2.0], dtype=torch.float64)
    K = (Q * eigenvalues) @ Q.T
    assert torch.allclose(ntk.spectrum(K), eigenvalues)
    # entropy of (1/2, 1/4, 1/8, 1/8) is 1.75 bits
    assert ntk.effective_rank(K) == pytest.approx(2**1.75)
    assert ntk.effective_rank(torch.eye(6)) == pytest.approx(6)
    assert ntk.effective_rank(torch.ones(6, 6)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ntk.kernel_alignment(torch.eye(2), torch.eye(3)), "same shape"),
        (lambda: ntk.kernel_alignment(torch.zeros(2, 2), torch.eye(2)), "K1 is zero"),
        (lambda: ntk.kernel_distance(torch.eye(2), torch.full((2, 2), math.nan)), "K2 holds NaN"),
        (lambda: ntk.kernel_distance(torch.eye(2), torch.eye(2), kind="l1"), "kind must be one of"),
        (lambda: ntk.cka(torch.ones(2, 3), torch.ones(2, 3)), "symmetric kernel"),
        (lambda: ntk.cka(torch.ones(2, 2), torch.eye(2)), "constant after centring"),
        (lambda: ntk.effective_rank(torch.diag(torch.tensor([1.0, -1.0]))), "not positive semi-definite"),
        (lambda: ntk.effective_rank(torch.zeros(2, 2)), "zero kernel"),
        (lambda: ntk.trace_ratio(torch.eye(2), torch.zeros(2, 2)), "trace 0"),
        (lambda: ntk.flatten(torch.ones(2, 2, 3)), "output by output"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_principal_angles_of_planted_eigenspaces():
    Q = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    turned = Q.clone()
    turned[:, 1] = math.cos(0.3) * Q[:, 1] + math.sin(0.3) * Q[:, 4]
    turned[:, 4] = -math.sin(0.3) * Q[:, 1] + math.cos(0.3) * Q[:, 4]
    eigenvalues = torch.tensor([9.0, 7.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    K1, K2 = (Q * eigenvalues) @ Q.T, (turned * eigenvalues) @ turned.T
    assert ntk.principal_angles(K1, K2, 2).tolist() == pytest.approx([0.0, 0.3], abs=1e-14)
    assert ntk.eigenspace_overlap(K1, K2, 2) == pytest.approx((1 + math.cos(0.3) ** 2) / 2)
    assert ntk.eigenspace_overlap(K1, K2, 5) == pytest.approx(1)
    with pytest.raises(ntk.UndefinedMetricError, match="K2 has fewer than 2"):
        ntk.principal_angles(K1, torch.ones(5, 5), 2)
    with pytest.raises(ValueError, match="rank must be whole, between 1 and 5"):
        ntk.principal_angles(K1, K2, 6)


# --- equivalent random directions -----------------------------------------------------------------------------------


def test_the_participation_ratio_counts_equal_eigenvalues():
    assert ntk.participation_ratio(torch.diag(torch.tensor([2.0, 2.0, 2.0, 0.0]))) == pytest.approx(3)
    assert ntk.participation_ratio(1e200 * torch.ones(4, 4, dtype=torch.float64)) == pytest.approx(1)
    K = gram(4, 3, 0, c=2)
    values = ntk.spectrum(K)
    assert ntk.participation_ratio(K) == pytest.approx(float(values.sum() ** 2 / values.square().sum()))
    with pytest.raises(ntk.UndefinedMetricError):
        ntk.participation_ratio(torch.zeros(3, 3))


@pytest.mark.parametrize("m", [10, 100, 1000])
@pytest.mark.parametrize(("n", "decay"), [(40, 0.0), (80, 0.25)], ids=["flat", "decaying"])
def test_random_projections_count_as_their_own_number_of_directions(n, decay, m):
    generator = torch.Generator().manual_seed(m)
    J = torch.randn(n, 200, generator=generator, dtype=torch.float64) * torch.arange(1, 201).double() ** -decay
    K = J @ J.T + 5.0  # The mean that CKA removes does not count.
    projections = [torch.randn(200, m, generator=generator, dtype=torch.float64) for _ in range(10)]
    found = [ntk.equivalent_directions(K, ntk.cka(K, J @ R @ R.T @ J.T)) for R in projections]
    assert ntk.participation_ratio(ntk.center(K)) > 20
    # Ten draws of a number whose relative scatter is below 10 %.
    assert sum(found) / 10 == pytest.approx(m, rel=0.1)


def test_limits_of_the_equivalent_number_of_directions():
    K = gram(10, 20, 0)
    assert ntk.equivalent_directions(K, 0.0) == 0
    assert ntk.equivalent_directions(K, 1.0) == math.inf
    assert ntk.equivalent_directions(3 * K, 0.5) == pytest.approx(ntk.equivalent_directions(K, 0.5))
    expected = (1 + ntk.participation_ratio(ntk.center(K))) / (1 / 0.8**2 - 1)
    assert ntk.equivalent_directions(K, 0.8) == pytest.approx(expected)
    with pytest.raises(ValueError, match="from 0 to 1"):
        ntk.equivalent_directions(K, 1.1)
    with pytest.raises(ntk.UndefinedMetricError):
        ntk.equivalent_directions(torch.ones(3, 3), 0.5)
