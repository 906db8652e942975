"""Distance and alignment of two kernels, and the spectrum of one.

Every function takes kernels as tensors or arrays of numpy, ``(n1, n2)`` or ``(n1, n2, c, c)``; the latter are compared
as their flattened matrices (:func:`ntk.flatten`), so all pairs of outputs count. Sums run in float64, whatever the
scale of the entries. A kernel that is complex or not finite raises ``ValueError``, a result beyond the range of float64
``OverflowError``. The metrics of two kernels depend on the examples in the batch; compare them with those of the null
models of :mod:`ntk.nulls`.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ntk.checks import (
    as_tensor,
    check_tensor,
    in_range,
    norm,
    normalised,
    not_overflown,
    power_of_two,
    real_and_finite,
    shifted,
)
from ntk.layout import Kernel, check_semidefinite, kernel_matrix

# Squared alignments as close to 1 as this differ from it by rounding.
_EXACT = 1e-13
DISTANCES = ("relative_frobenius", "mean_absolute", "max_absolute")


class UndefinedMetricError(ValueError):
    """A metric has no value on these kernels, for instance an alignment with a kernel of zeros."""


def kernel_distance(K1: Kernel, K2: Kernel, *, kind: str = "relative_frobenius", scaled: bool = False) -> float:
    """Distance of K2 from K1, from the differences of their entries.

    | ``kind``                 | D = K1 - s K2                  | unit        |
    |--------------------------|--------------------------------|-------------|
    | ``"relative_frobenius"`` | ||D||_F / ||K1||_F             | 1           |
    | ``"mean_absolute"``      | mean |D|                       | that of K1  |
    | ``"max_absolute"``       | max |D|                        | that of K1  |

    s = 1, or with ``scaled`` the :func:`best_scale` that minimises ||K1 - s K2||_F; the relative distance is then
    sqrt(1 - alignment^2), and 1 for orthogonal kernels.

    Raises:
        ValueError: unknown kind, unequal shapes, a non-finite kernel, K1 = 0 with the relative distance.
    """
    if kind not in DISTANCES:
        raise ValueError(f"kind must be one of {', '.join(map(repr, DISTANCES))}; got {kind!r}")
    A, B = _pair(K1, K2)
    exponent = power_of_two(A) if scaled else max(power_of_two(A), power_of_two(B))
    D = shifted(A, -exponent)
    if scaled:
        B = normalised(B)[0]
        D = D - _scale(D, B) * B
    else:
        D = D - shifted(B, -exponent)
    if kind == "relative_frobenius":
        (above, raised), (below, lowered) = norm(D), _norm(A, "K1")
        return in_range(above / below, exponent + raised - lowered, "the relative distance")
    D, raised = normalised(D)
    return in_range(float(D.abs().mean() if kind == "mean_absolute" else D.abs().max()), exponent + raised, kind)


def best_scale(K1: Kernel, K2: Kernel) -> float:
    """The s that minimises ||K1 - s K2||_F: <K1, K2>_F / ||K2||_F^2."""
    (A, above), (B, below) = map(normalised, _pair(K1, K2))
    return in_range(_scale(A, B), above - below, "the best scale")


def kernel_alignment(K1: Kernel, K2: Kernel) -> float:
    """Cosine of the angle between two kernels, <K1, K2>_F / (||K1||_F ||K2||_F), in [-1, 1].

    It does not change if either is scaled by a positive number (Cristianini et al. 2001, def. 1). It is near 1 for any
    two kernels with a large mean entry; :func:`cka` removes the mean.
    """
    return _cosine(*_pair(K1, K2))


def cka(K1: Kernel, K2: Kernel) -> float:
    """Centred kernel alignment: the alignment of H K1 H and H K2 H, H = I - 1 1^T / n.

    The examples are centred for each output separately, which centres the features (Cortes, Mohri and Rostamizadeh
    2012, sec. 2.1; Kornblith et al. 2019, eq. 3). Square kernels only.

    Raises:
        UndefinedMetricError: a kernel is constant over the examples, up to the rounding of its entries.
    """
    _check_shapes(K1, K2)
    if K1.ndim not in (2, 4) or K1.shape[0] != K1.shape[1]:
        raise ValueError(f"cka takes a symmetric kernel, (n, n) or (n, n, c, c); got {tuple(K1.shape)}")
    return _cosine(_centred(K1, "K1"), _centred(K2, "K2"))


def center(kernel: Kernel) -> Float[Tensor, "_ _ ..."]:
    """H K H over the examples: the kernel of the features minus their mean over the batch, in float64."""
    scaled, exponent = normalised(real_and_finite(kernel, "the kernel"))
    scaled = scaled - scaled.mean(dim=0, keepdim=True)
    centred = shifted(scaled - scaled.mean(dim=1, keepdim=True), exponent)
    return not_overflown(centred, "the centred entries", "scale the kernel")


def trace(kernel: Kernel) -> float:
    """Trace of the flattened matrix: the squared Frobenius norm of the Jacobian."""
    return in_range(*_trace(kernel), "the trace")


def trace_ratio(K1: Kernel, K2: Kernel) -> float:
    """tr K1 / tr K2."""
    (above, raised), (below, lowered) = _trace(K1), _trace(K2)
    if below == 0:
        raise UndefinedMetricError("K2 has trace 0: its parameters do not influence the outputs")
    return in_range(above / below, raised - lowered, "the ratio of the traces")


def matching_degree(K_full: Kernel, K_propulsion_1: Kernel) -> float:
    """k* = sqrt(tr K_F / tr K_P(1)): the degree at which Propulsion's kernel has the size of full fine-tuning's.

    ``K_propulsion_1`` is the kernel at degree 1 and z = 1, where K_P(k) = k^2 K_P(1).

    Raises:
        ValueError: the traces have different signs; that of a tangent kernel is not negative.
    """
    ratio = trace_ratio(K_full, K_propulsion_1)
    if ratio < 0:
        raise ValueError(
            f"expected traces that are not negative, as of tangent kernels; got {trace(K_full):.3g} and "
            f"{trace(K_propulsion_1):.3g}"
        )
    return ratio**0.5


def spectrum(kernel: Kernel) -> Float[Tensor, "m"]:
    """Eigenvalues of the flattened matrix in descending order, float64, in the unit of the kernel. Cost O((n c)^3).

    Raises:
        ValueError: the kernel is not symmetric; the eigenvalues of its symmetric part would be those of another.
    """
    matrix, exponent = normalised(kernel_matrix(kernel, symmetric=True))
    values = shifted(torch.linalg.eigvalsh(matrix).flip(0), exponent)
    return not_overflown(values, "the eigenvalues", "scale the kernel")


def effective_rank(kernel: Kernel) -> float:
    """exp of the entropy of the normalised spectrum, between 1 and n c (Roy and Vetterli 2007, def. 1).

    Raises:
        ValueError: the kernel is zero, not symmetric, or has negative eigenvalues beyond rounding.
    """
    eigenvalues = torch.linalg.eigvalsh(normalised(kernel_matrix(kernel, symmetric=True))[0])
    if eigenvalues[-1] <= 0:
        raise UndefinedMetricError("the effective rank of a zero kernel is undefined")
    # Rounding gives single-precision kernels eigenvalues of relative size 1e-7 with either sign.
    check_semidefinite(eigenvalues, 1e-4)
    p = eigenvalues.clamp(min=0) / eigenvalues.clamp(min=0).sum()
    return float(torch.exp(torch.special.entr(p).sum()))


def participation_ratio(kernel: Kernel) -> float:
    """(sum of the eigenvalues)^2 / sum of their squares: (tr K)^2 / ||K||_F^2, between 1 and n c.

    The number of equal eigenvalues that would give the same ratio. Unlike :func:`effective_rank` it needs no spectrum.

    Raises:
        UndefinedMetricError: the kernel is zero.
    """
    matrix = normalised(kernel_matrix(kernel, square=True))[0]
    return float(matrix.trace() / _norm(matrix, "the kernel")[0]) ** 2


def equivalent_directions(K: Kernel, alignment: float) -> float:
    """The number m of random directions whose Gaussian sketch of K would have this :func:`cka` with K.

    A sketch J R R^T J^T by m directions (:func:`ntk.gaussian_sketch`) has mean K, and its entries' squares have the sum
    ||K||^2 (1 + (1 + PR) / m) in the mean, with PR the :func:`participation_ratio`. Its alignment with K is therefore
    close to 1 / sqrt(1 + (1 + PR) / m), which gives

        m = (1 + PR) / (1 / alignment^2 - 1).

    PR is that of the centred kernel, since the alignment is centred. Drawn sketches agree with it within a few percent
    for PR above 20, and within 10 % at 13; for a kernel with one dominant direction, of PR 2, it is too large by a
    factor of 2. m is 0 without any alignment and infinite for an alignment that is 1 up to rounding.

    Args:
        K: The kernel that is compared with, symmetric, such as that of full fine-tuning.
        alignment: Its CKA with another kernel, from 0 to 1.

    Raises:
        ValueError: the alignment is not from 0 to 1.
        UndefinedMetricError: the kernel is constant over the examples.
    """
    if not 0 <= alignment <= 1:
        raise ValueError(f"expected an alignment from 0 to 1; got {alignment}")
    ratio = participation_ratio(_centred(K, "the kernel"))
    missing = 1 - alignment**2
    return (1 + ratio) * alignment**2 / missing if missing > _EXACT else math.inf


def principal_angles(K1: Kernel, K2: Kernel, rank: int) -> Float[Tensor, "rank"]:
    """Angles between the spans of the kernels' top ``rank`` eigenvectors: ascending, in radians, from 0 to pi / 2.

    Their cosines are the singular values of U1^T U2 (Björck and Golub 1973, thm. 1); small angles are computed from
    their sines (Knyazev and Argentati 2002), so that all angles have absolute errors of rounding size times the largest
    eigenvalue, divided by its distance from the next at the rank. Cost O((n c)^3).

    Raises:
        ValueError: unequal shapes, a kernel that is not symmetric, or ``rank`` outside 1 to n c.
        UndefinedMetricError: the span is arbitrary, since fewer than ``rank`` eigenvalues lie above rounding, or the
            eigenvalue of this rank and the next are equal up to rounding.
    """
    _check_shapes(K1, K2)
    spans = []
    for name, kernel in (("K1", K1), ("K2", K2)):
        matrix = normalised(kernel_matrix(kernel, name, symmetric=True))[0]
        if not 1 <= rank <= len(matrix) or rank % 1:
            raise ValueError(f"rank must be whole, between 1 and {len(matrix)}, the size of the kernel; got {rank}")
        values, vectors = torch.linalg.eigh(matrix)
        rounding = len(matrix) * _rounding(kernel) * values[-1].clamp(min=0)
        if values[-rank] <= rounding:
            raise UndefinedMetricError(f"{name} has fewer than {rank} positive eigenvalues")
        if rank < len(matrix) and values[-rank] - values[-rank - 1] <= rounding:
            raise UndefinedMetricError(
                f"the span of the top {rank} eigenvectors of {name} is arbitrary: eigenvalues {rank} and {rank + 1} "
                "are equal up to rounding; take a rank between distinct eigenvalues"
            )
        spans.append(vectors[:, -rank:])
    left, right = spans
    inner = left.T @ right
    cosines, sines = torch.linalg.svdvals(inner), torch.linalg.svdvals(right - left @ inner).flip(0)
    # Not scipy.linalg.subspace_angles, which loses digits of small angles if others are near pi / 2.
    return torch.where(cosines**2 > 0.5, torch.arcsin(sines.clamp(0, 1)), torch.arccos(cosines.clamp(0, 1)))


def eigenspace_overlap(K1: Kernel, K2: Kernel, rank: int) -> float:
    """Mean squared cosine of the :func:`principal_angles`: 1 for equal spans, rank / (n c) expected of random ones."""
    return float(principal_angles(K1, K2, rank).cos().square().mean())


def _pair(K1: Kernel, K2: Kernel) -> tuple[Tensor, Tensor]:
    """Both kernels as finite float64 matrices of one shape."""
    _check_shapes(K1, K2)
    return kernel_matrix(K1, "K1"), kernel_matrix(K2, "K2")


def _check_shapes(K1: Kernel, K2: Kernel) -> None:
    """Raise unless both are tensors of one shape."""
    for name, kernel in (("K1", K1), ("K2", K2)):
        check_tensor(as_tensor(kernel), name)
    if K1.shape != K2.shape:
        raise ValueError(f"the kernels must have the same shape; got {tuple(K1.shape)} and {tuple(K2.shape)}")


def _centred(kernel: Kernel, name: str) -> Tensor:
    """The flattened matrix of a kernel of order 1 after centring, in float64."""
    K = normalised(real_and_finite(kernel, name))[0]
    centred = kernel_matrix(center(K), name)
    if float(centred.norm()) <= 4 * _rounding(kernel) * float(K.norm()):
        raise _zero(name)
    return centred


def _rounding(kernel: Kernel) -> float:
    """The relative rounding of a kernel's entries, by the dtype in which the caller holds it."""
    kernel = as_tensor(kernel)
    return torch.finfo(kernel.dtype if kernel.is_floating_point() else torch.float64).eps


def _zero(name: str) -> UndefinedMetricError:
    return UndefinedMetricError(
        f"{name} is zero: its parameters do not influence the outputs (or are constant after centring)"
    )


def _norm(A: Tensor, name: str) -> tuple[float, int]:
    value, exponent = norm(A)
    if value == 0:
        raise _zero(name)
    return value, exponent


def _cosine(A: Tensor, B: Tensor) -> float:
    A, B = normalised(A)[0], normalised(B)[0]
    cosine = float((A * B).sum()) / (_norm(A, "K1")[0] * _norm(B, "K2")[0])
    return min(1.0, max(-1.0, cosine))  # rounding


def _scale(A: Tensor, B: Tensor) -> float:
    """<A, B> / |B|^2, for entries of order 1."""
    if not B.any():
        raise _zero("K2")
    return float((A * B).sum() / B.norm() ** 2)


def _trace(kernel: Kernel) -> tuple[float, int]:
    matrix, exponent = normalised(kernel_matrix(kernel, square=True))
    return float(matrix.trace()), exponent
