"""Methods on a map: kernels as points, near one another where their CKA is high."""

import numpy as np


def classical_scaling(similarity: np.ndarray, dimensions: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates ``(m, dimensions)`` of m objects from their similarities, and the share of variance of each axis.

    A CKA is the cosine between two centred kernels, so that d^2 = 2 (1 - CKA) is the squared distance of the two at
    unit length, and classical scaling (Torgerson 1952) is exact: the principal components of the kernels themselves,
    B = -H D^2 H / 2 = H S H with H = I - 1 1^T / m. Signs are fixed: the largest coordinate of an axis is positive.

    Args:
        similarity: ``(m, m)``, symmetric, 1 on the diagonal, finite.
        dimensions: of the map; axes beyond the rank of B are zero.
    """
    S = np.asarray(similarity, dtype=float)
    B = S - S.mean(0) - S.mean(1, keepdims=True) + S.mean()
    values, vectors = np.linalg.eigh((B + B.T) / 2)
    values, vectors = values[::-1].clip(0), vectors[:, ::-1]
    vectors = vectors * np.where(np.abs(vectors).max(0) == vectors.max(0), 1.0, -1.0)
    total = values.sum()
    shares = values / total if total > 0 else values
    padding = max(0, dimensions - len(S))
    coordinates = np.pad(vectors * np.sqrt(values), ((0, 0), (0, padding)))
    return coordinates[:, :dimensions], np.pad(shares, (0, padding))[:dimensions]
