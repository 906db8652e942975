"""Bounds on the distance between the kernels of a layer's weight and of its scales, at any weights and any width.

K_F, K_M and K_P are the kernels of :mod:`ntk.layerwise`, and M_i = sum_t g_t v_t^T, ``(r, r)``, is the feature of K_M
for one example and output: r K_M[i, j] = <M_i, M_j> and K_P[i, j] = <diag M_i, diag M_j>. Nothing here is a limit.

| step   | what bounds it                                                              | function            |
|--------|-----------------------------------------------------------------------------|---------------------|
| F to P | the alignments of F with M and of M with P                                  | `distance_interval` |
| F to M | the largest and least squared singular value of the weight on the inputs    | `conditioning`      |
| M to P | for scales in a random basis, the width r (exact variance of each entry)    | `rotated_variance`  |
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ntk.adapters import rotated_mean
from ntk.checks import real_and_finite


class DistanceInterval(NamedTuple):
    """Where min_s ||K_F - s K_P||_F / ||K_F||_F lies."""

    low: float
    high: float


def distance_interval(full_metric: float, metric_scales: float) -> DistanceInterval:
    """The interval of min_s ||K_F - s K_P|| / ||K_F|| that follows from the alignments of F with M and of M with P.

    With the angles alpha = arccos(full_metric) and beta = arccos(metric_scales) it is

        sin |alpha - beta|  to  sin(min(alpha + beta, pi / 2))

    because the distance after the best scale is the sine of the angle between F and P, and angles in a Euclidean space
    satisfy the triangle inequality. Both ends are reached by coplanar kernels, so no narrower interval follows from the
    two alignments. For CKA in place of cosine alignments, all three kernels are centred.

    Args:
        full_metric: alignment of K_F and K_M, from 0 to 1; kernels of the same examples.
        metric_scales: alignment of K_M and K_P, from 0 to 1.

    Raises:
        ValueError: an alignment outside 0 to 1, which two positive semi-definite kernels do not have.

    Example:
        >>> low, high = distance_interval(0.99, 0.96)
        >>> round(low, 3), round(high, 3)
        (0.142, 0.413)
    """
    for name, value in (("full_metric", full_metric), ("metric_scales", metric_scales)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is an alignment of two kernels and must lie between 0 and 1; got {value}")
    alpha, beta = math.acos(full_metric), math.acos(metric_scales)
    return DistanceInterval(math.sin(abs(alpha - beta)), math.sin(min(alpha + beta, math.pi / 2)))


class Conditioning(NamedTuple):
    """- bound K_F <= K_F - scale K_M <= bound K_F, as matrices, and so ||K_F - scale K_M|| <= bound ||K_F||."""

    scale: float
    bound: float


def conditioning(weight: Float[Tensor, "..."], inputs: Float[Tensor, "..."]) -> Conditioning:
    """How far K_M of a layer without a bias can be from its K_F, from the layer's weight and inputs alone.

    With a and b the largest and least eigenvalue of W^T W / r on the span of the inputs,

        scale = 2 / (a + b),    bound = (a - b) / (a + b),

    because K_F - scale K_M = sum_ts (g_t . g'_s) a_t^T (1 - scale W^T W / r) a'_s. The bound is 1, and says nothing, if
    the weight maps a direction of the inputs to 0, as it does where the inputs span more than r dimensions. Among
    bounds by the weight and the span of the inputs alone it is the best: some gradients reach it.

    Args:
        weight: ``(r, s)``.
        inputs: ``(N, s)``, of all tokens of all examples.

    For a layer with a bias b, pass [W b] and inputs with a coordinate of 1: K_F is then that of weight and bias.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, inputs or products of zeros.

    Cost: that of a singular value decomposition of the inputs, and of one of r times their rank.

    Example:
        >>> scale, bound = conditioning(torch.diag(torch.tensor([1.0, 2.0, 2.0])), torch.eye(3))
        >>> round(scale, 3), round(bound, 3)  # the eigenvalues of W^T W / r are 1/3, 4/3 and 4/3
        (1.2, 0.6)
    """
    weight, inputs = real_and_finite(weight, "weight"), real_and_finite(inputs, "inputs")
    if weight.ndim != 2 or inputs.ndim != 2 or weight.shape[1] != inputs.shape[1]:
        raise ValueError(
            f"expected a weight (r, s) and inputs (N, s); got {tuple(weight.shape)} and {tuple(inputs.shape)}"
        )
    _, sizes, directions = torch.linalg.svd(inputs, full_matrices=False)
    kept = sizes > sizes[:1] * max(inputs.shape) * torch.finfo(inputs.dtype).eps
    values = torch.linalg.svdvals(weight @ directions[kept].T).square() / len(weight)
    if not values.any():
        raise ValueError("the weight maps all inputs to 0, so that K_M is 0: give inputs of the layer")
    largest = float(values.max())
    least = float(values.min()) if kept.sum() <= len(weight) else 0.0  # otherwise a direction is mapped to 0
    return Conditioning(2 / (largest + least), (largest - least) / (largest + least))


def rotated_variance(M: Float[Tensor, "..."], M2: Float[Tensor, "..."]) -> Float[Tensor, "m n"]:
    """The exact variance of each entry of K_P in a random orthogonal basis of the outputs, at degree 1.

    With S and S' the symmetric parts of two features and N = tr(S) S' + tr(S') S + 2 (S S' + S' S),

        Var = (4 (|S|^2 |S'|^2 + <S, S'>^2 + 4 tr(S^2 S'^2)) - 4 |N_0|^2 / (r + 4) - 2 tr(N)^2 / (r (r + 2)))
              / ((r + 1)(r + 2)(r + 6)),     N_0 = N - tr(N) 1 / r.

    The quartic (q^T S q)(q^T S' q) of a unit vector q has parts that are spherical harmonics of degree 0, 2 and 4.
    Summed over the vectors of a basis, the second vanishes and the third has this variance (docs/theory.md, Theorem
    13).

    Args:
        M: ``(m, r, r)``, the features of some rows of the kernel.
        M2: ``(n, r, r)``, those of its columns.

    Raises:
        ValueError: features that are not square or not of one size, or not finite.

    Cost: m n r^3; :func:`rotated_deviation` bounds the sum of all entries in m r^3.
    """
    S, S2 = _symmetric(M), _symmetric(M2)
    r = S.shape[-1]
    if S2.shape[-1] != r:
        raise ValueError(f"expected features of one layer; got {tuple(M.shape)} and {tuple(M2.shape)}")
    products = torch.einsum("iab,jbc->ijac", S, S2)
    N = 2 * (products + products.mT)
    N += torch.einsum("i,jab->ijab", _trace(S), S2) + torch.einsum("iab,j->ijab", S, _trace(S2))
    sizes = S.square().sum((1, 2))[:, None] * S2.square().sum((1, 2))
    inner = torch.einsum("iab,jab->ij", S, S2)
    quartic = 4 * (sizes + inner**2 + 4 * products.square().sum((2, 3)))  # tr(S^2 S'^2) = |S S'|^2
    traceless = N.square().sum((2, 3)) - _trace(N) ** 2 / r
    return (quartic - 4 * traceless / (r + 4) - 2 * _trace(N) ** 2 / (r * (r + 2))) / ((r + 1) * (r + 2) * (r + 6))


def rotated_deviation(M: Float[Tensor, "..."]) -> float:
    """A bound on the root of E ||K_P - E K_P||_F^2 over random orthogonal bases of the outputs, at degree 1.

        2 sqrt(((sum_i |S_i|^2)^2 + sum_ij <S_i, S_j>^2 + 4 |sum_i S_i^2|^2) / ((r + 1)(r + 2)(r + 6)))

    It is the sum of :func:`rotated_variance` without its negative terms, which are smaller by a factor of 1 / r if the
    traces of the features are not large. By Markov's inequality the distance exceeds 1 / sqrt(p) times this with a
    probability of p at most.

    Args:
        M: ``(m, r, r)``, the features of all rows of the kernel, examples and outputs.

    Raises:
        ValueError: features that are not square, or not finite.

    Cost: m r^3.
    """
    S = _symmetric(M)
    r = S.shape[-1]
    gram = torch.einsum("iab,jab->ij", S, S)
    square = gram.trace() ** 2 + gram.square().sum() + 4 * torch.einsum("iab,ibc->ac", S, S).square().sum()
    return 2 * float((square / ((r + 1) * (r + 2) * (r + 6))).sqrt())


def rotated_bound(M: Float[Tensor, "..."], failure: float) -> float:
    """A bound on ||K_P - K_M||_F that K_P in a random basis of the outputs keeps with probability 1 - ``failure``.

        ||E K_P - K_M||_F + rotated_deviation(M) / sqrt(failure)

    With :func:`conditioning`, ||K_F - s K_P|| <= bound ||K_F|| + s times this, at the scale s that it returns.

    Args:
        M: ``(m, r, r)``, the features of all rows of the kernel, examples and outputs.
        failure: the probability, over bases, that the bound does not hold, between 0 and 1.

    Raises:
        ValueError: as :func:`rotated_deviation`; a probability outside 0 to 1.
    """
    if not 0 < failure < 1:
        raise ValueError(f"failure is a probability and must lie between 0 and 1; got {failure}")
    M = real_and_finite(M, "M")
    deviation = rotated_deviation(M)
    r = M.shape[-1]
    products, transposed = torch.einsum("iab,jab->ij", M, M), torch.einsum("iab,jba->ij", M, M)
    mean = rotated_mean(products, torch.outer(_trace(M), _trace(M)), transposed, r)
    return float((mean - products / r).norm()) + deviation / math.sqrt(failure)


def _symmetric(M: Tensor) -> Tensor:
    M = real_and_finite(M, "M")
    if M.ndim != 3 or M.shape[1] != M.shape[2]:
        raise ValueError(f"expected features (m, r, r) of a matrix on the outputs; got {tuple(M.shape)}")
    return (M + M.mT) / 2


def _trace(A: Tensor) -> Tensor:
    return A.diagonal(dim1=-2, dim2=-1).sum(-1)
