"""Classical scaling preserves distances."""

import numpy as np
import pytest

from analyses.peft_kernels.measures import classical_scaling


def test_distances_of_a_plane_are_kept():
    """The objects are unit vectors in three dimensions that lie in a plane not through the origin."""
    rng = np.random.default_rng(0)
    angles = rng.uniform(0, 2 * np.pi, size=7)
    vectors = np.stack([0.6 * np.cos(angles), 0.6 * np.sin(angles), np.full(7, 0.8)], axis=1)
    points, shares = classical_scaling(vectors @ vectors.T)
    distances, expected = (np.linalg.norm(v[:, None] - v, axis=-1) for v in (points, vectors))
    np.testing.assert_allclose(distances, expected, atol=1e-7)
    assert shares.sum() == pytest.approx(1)
    assert shares[0] >= shares[1]


def test_signs_are_fixed_and_axes_that_are_missing_are_zero():
    points, shares = classical_scaling(np.array([[1.0, 0.5], [0.5, 1.0]]))
    np.testing.assert_allclose(points[:, 1], 0, atol=1e-12)
    assert sorted(points[:, 0]) == pytest.approx([-0.5, 0.5])
    assert shares == pytest.approx([1, 0])
    alone, shares = classical_scaling(np.ones((1, 1)))
    assert alone.shape == (1, 2)
    assert np.all(alone == 0)
    assert np.all(shares == 0)
