"""Lanczos' recurrence for a symmetric operator, from several vectors at a time, and the spectral density from it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.linalg import eigh_tridiagonal
from scipy.sparse.linalg import LinearOperator

from ntk.checks import check_count
from ntk.trace_estimation import RandomEstimate, images, mean_of, square_operator


@dataclass(frozen=True)
class Krylov:
    """For each of k vectors b: an orthonormal basis V of its Krylov space, in which A is the tridiagonal T.

        A V = V T + beta_m v_{m+1} e_m^T,   b = |b| V e_1

    Attributes:
        basis: V of each vector, ``(k, m, rows)``; zeros after the space of a vector has become invariant.
        alpha: the diagonal of T, ``(k, m)``.
        beta: ``(k, m)``, the entries beside it, and last beta_m.
        lengths: |b|, ``(k,)``.
    """

    basis: Float[np.ndarray, "k m rows"]
    alpha: Float[np.ndarray, "k m"]
    beta: Float[np.ndarray, "k m"]
    lengths: Float[np.ndarray, "k"]

    def eigen(self, j: int) -> tuple[Float[np.ndarray, "m"], Float[np.ndarray, "m m"]]:
        """Eigenvalues and eigenvectors of T of vector j."""
        values, vectors = eigh_tridiagonal(self.alpha[j], self.beta[j, :-1])  # pyright: ignore[reportAssignmentType]
        return np.asarray(values), np.asarray(vectors)

    def column(self, j: int, function: Callable[[np.ndarray], np.ndarray]) -> Float[np.ndarray, "m"]:
        """function(T) e_1 of vector j."""
        values, vectors = self.eigen(j)
        return vectors @ (function(values) * vectors[0])

    def remainder(self, function: Callable[[np.ndarray], np.ndarray]) -> Float[np.ndarray, "k"]:
        """beta_m |function(T)[m, 1]| of each vector: what the space lacks, relative to |b|."""
        return np.array([b[-1] * abs(self.column(j, function)[-1]) for j, b in enumerate(self.beta)])

    def applied(self, function: Callable[[np.ndarray], np.ndarray]) -> Float[np.ndarray, "rows k"]:
        """|b| V function(T) e_1, which approximates function(A) b."""
        columns = [self.basis[j].T @ self.column(j, function) for j in range(len(self.lengths))]
        return np.stack(columns, axis=1) * self.lengths


def lanczos(
    A: LinearOperator,
    B: Float[np.ndarray, "rows k"],
    steps: int,
    enough: Callable[[Krylov], bool] = lambda found: False,
) -> Krylov:
    """Lanczos' recurrence with full reorthogonalisation (Golub and Van Loan 2013, section 10.1), in float64.

    It stops after ``steps`` products with blocks of k vectors, at the number of rows, or when ``enough`` holds, which
    is asked after every fourth step. Cost beside the products: rows k steps^2; memory rows k steps.
    """
    rows, k = B.shape
    steps = min(steps, rows)
    lengths = np.linalg.norm(B, axis=0)
    basis, alpha, beta = np.zeros((k, steps, rows)), np.zeros((k, steps)), np.zeros((k, steps))
    basis[:, 0] = (B / np.where(lengths > 0, lengths, 1.0)).T
    size = np.zeros(k)  # of A, as far as T shows it
    for m in range(steps):
        image = images(A, basis[:, m].T).T.copy()  # (k, rows)
        alpha[:, m] = (basis[:, m] * image).sum(axis=1)
        for V, vector in zip(basis[:, : m + 1], image, strict=True):
            for _ in range(2):  # once is not enough where the space is nearly invariant
                vector -= V.T @ (V @ vector)
        length = np.linalg.norm(image, axis=1)
        size = np.maximum(size, np.abs(alpha[:, m]) + length)
        length[length <= rows * np.finfo(np.float64).eps * size] = 0.0
        beta[:, m] = length
        found = Krylov(basis[:, : m + 1], alpha[:, : m + 1], beta[:, : m + 1], lengths)
        if m + 1 == steps or not length.any() or (m % 4 == 3 and enough(found)):
            return found
        basis[:, m + 1] = image * ((length > 0) / np.where(length > 0, length, 1.0))[:, None]
    raise AssertionError("steps is at least 1")


@dataclass(frozen=True)
class SpectralDensity:
    """The spectrum of an operator as seen by random vectors: eigenvalues with weights, from each vector.

    Attributes:
        nodes: ``(probes, steps)``.
        weights: ``(probes, steps)``; those of a probe sum to the number of rows.
    """

    nodes: Float[np.ndarray, "probes steps"]
    weights: Float[np.ndarray, "probes steps"]

    def trace(self, function: Callable[[np.ndarray], np.ndarray]) -> RandomEstimate:
        """The sum of a function over the eigenvalues, tr f(A); exact in mean for polynomials of degree < 2 steps."""
        return mean_of((self.weights * function(self.nodes)).sum(axis=1))

    def count(self, threshold: int | float) -> RandomEstimate:
        """The number of eigenvalues of at least ``threshold``.

        An eigenvalue that the nodes do not resolve counts as where its node lies, which adds an error of up to the
        weight of one node.
        """
        return self.trace(lambda values: (values >= threshold).astype(np.float64))

    def density(self, at: Float[np.ndarray, "points"], width: int | float) -> RandomEstimate:
        """The number of eigenvalues for each unit of length at some points, smoothed by a Gaussian of that width."""
        if not width > 0:
            raise ValueError(f"width must be positive, a standard deviation in units of the eigenvalues; got {width}")
        distance = (np.asarray(at)[:, None, None] - self.nodes) / width
        bumps = np.exp(-(distance**2) / 2) / (width * np.sqrt(2 * np.pi))
        return mean_of((bumps * self.weights).sum(axis=2))


def spectral_density(operator: Any, *, probes: int = 8, steps: int = 40, seed: int = 0) -> SpectralDensity:
    """The eigenvalues' density by stochastic Lanczos quadrature (Ubaru, Chen and Saad 2017, algorithm 1).

    A random vector of length sqrt(rows) sees an eigenvalue with the squared length of its projection, whose mean is 1.
    ``steps`` steps of Lanczos' recurrence give Gauss' quadrature of that measure. Standard errors are those of the mean
    over probes; they do not hold the error of the quadrature, which falls exponentially with the steps for smooth
    functions and slowly for counts.

    Args:
        operator: a symmetric scipy ``LinearOperator`` such as :class:`ntk.NTKOperator`, or a matrix.
        probes: number of random vectors, at least 2, which are multiplied as one block.
        steps: number of products with the block.
        seed: of the random vectors.

    Raises:
        ValueError: an operator that is not square, or whose products are not finite; fewer than two probes.

    Example:
        >>> found = spectral_density(np.diag(np.repeat([1.0, 3.0], 50)), probes=4, steps=5)
        >>> round(found.trace(lambda values: values).value), round(found.count(0.5).value)
        (200, 100)
    """
    A = square_operator(operator)
    check_count(probes, "probes")
    check_count(steps, "steps")
    if probes < 2:
        raise ValueError("one probe has no standard error: take at least 2")
    found = lanczos(A, np.random.default_rng(seed).standard_normal((A.shape[0], probes)), steps)
    values, vectors = zip(*(found.eigen(j) for j in range(probes)), strict=True)
    return SpectralDensity(np.stack(values), np.stack([v[0] ** 2 for v in vectors]) * A.shape[0])
