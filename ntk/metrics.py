"""Distance and alignment of two kernels, and the spectrum of one.

Every function takes kernels as ``(n1, n2)`` or ``(n1, n2, c, c)``; the latter are compared as their flattened matrices
(:func:`ntk.flatten`), so all pairs of outputs count. Sums run in float64. The metrics of two kernels depend on the
examples in the batch; compare them with those of the null models of :mod:`ntk.nulls`.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ntk.layout import Kernel, flatten

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
    A, B = _pair(K1, K2)
    if kind not in DISTANCES:
        raise ValueError(f"kind must be one of {', '.join(map(repr, DISTANCES))}; got {kind!r}")
    difference = A - (_best_scale(A, B) if scaled else 1.0) * B
    if kind == "relative_frobenius":
        return float(difference.norm() / _norm(A, "K1"))
    return float(difference.abs().mean() if kind == "mean_absolute" else difference.abs().max())


def best_scale(K1: Kernel, K2: Kernel) -> float:
    """The s that minimises ||K1 - s K2||_F: <K1, K2>_F / ||K2||_F^2."""
    return _best_scale(*_pair(K1, K2))


def kernel_alignment(K1: Kernel, K2: Kernel) -> float:
    """Cosine of the angle between two kernels, <K1, K2>_F / (||K1||_F ||K2||_F), in [-1, 1].

    It does not change if either is scaled by a positive number (Cristianini et al. 2001, def. 1). It is near 1 for any
    two kernels with a large mean entry; :func:`cka` removes the mean.
    """
    A, B = _pair(K1, K2)
    return float((A * B).sum() / (_norm(A, "K1") * _norm(B, "K2")))


def cka(K1: Kernel, K2: Kernel) -> float:
    """Centred kernel alignment: the alignment of H K1 H and H K2 H, H = I - 1 1^T / n.

    The examples are centred for each output separately, which centres the features (Cortes, Mohri and Rostamizadeh
    2012, sec. 2.1; Kornblith et al. 2019, eq. 3). Square kernels only.
    """
    if K1.ndim not in (2, 4) or K1.shape[0] != K1.shape[1]:
        raise ValueError(f"cka takes a symmetric kernel, (n, n) or (n, n, c, c); got {tuple(K1.shape)}")
    return kernel_alignment(center(K1), center(K2))


def center(kernel: Kernel) -> Kernel:
    """H K H over the examples: the kernel of the features minus their mean over the batch, in float64."""
    kernel = kernel.double()
    kernel = kernel - kernel.mean(dim=0, keepdim=True)
    return kernel - kernel.mean(dim=1, keepdim=True)


def trace(kernel: Kernel) -> float:
    """Trace of the flattened matrix: the squared Frobenius norm of the Jacobian."""
    return float(_square(kernel).trace())


def trace_ratio(K1: Kernel, K2: Kernel) -> float:
    """tr K1 / tr K2."""
    denominator = trace(K2)
    if denominator == 0:
        raise UndefinedMetricError("K2 has trace 0: its parameters do not influence the outputs")
    return trace(K1) / denominator


def matching_degree(K_full: Kernel, K_propulsion_1: Kernel) -> float:
    """k* = sqrt(tr K_F / tr K_P(1)): the degree at which Propulsion's kernel has the size of full fine-tuning's.

    ``K_propulsion_1`` is the kernel at degree 1 and z = 1, where K_P(k) = k^2 K_P(1).
    """
    return trace_ratio(K_full, K_propulsion_1) ** 0.5


def spectrum(kernel: Kernel) -> Float[Tensor, "m"]:
    """Eigenvalues of the flattened matrix in descending order, float64, in the unit of the kernel. Cost O((n c)^3)."""
    matrix = _square(kernel)
    return torch.linalg.eigvalsh((matrix + matrix.T) / 2).flip(0)


def effective_rank(kernel: Kernel) -> float:
    """exp of the entropy of the normalised spectrum, between 1 and n c (Roy and Vetterli 2007, def. 1).

    Raises:
        ValueError: the kernel is zero, or has negative eigenvalues beyond rounding.
    """
    eigenvalues = spectrum(kernel)
    if eigenvalues[0] <= 0:
        raise UndefinedMetricError("the effective rank of a zero kernel is undefined")
    # Rounding gives single-precision kernels eigenvalues of relative size 1e-7 with either sign.
    if eigenvalues[-1] < -1e-4 * eigenvalues[0]:
        raise ValueError(
            f"the kernel is not positive semi-definite: eigenvalues from {eigenvalues[-1]:.3g} to {eigenvalues[0]:.3g}"
        )
    p = eigenvalues.clamp(min=0) / eigenvalues.clamp(min=0).sum()
    return float(torch.exp(torch.special.entr(p).sum()))


def principal_angles(K1: Kernel, K2: Kernel, rank: int) -> Float[Tensor, "rank"]:
    """Angles between the spans of the kernels' top ``rank`` eigenvectors: ascending, in radians, from 0 to pi / 2.

    Their cosines are the singular values of U1^T U2 (Björck and Golub 1973, thm. 1). Cost O((n c)^3).

    Raises:
        ValueError: unequal shapes, a kernel that is not symmetric, or ``rank`` outside 1 to n c.
        UndefinedMetricError: a kernel has fewer than ``rank`` eigenvalues above rounding, so its span is arbitrary.
    """
    spans = []
    for name, kernel in (("K1", K1), ("K2", K2)):
        matrix = _square(kernel)
        if not 1 <= rank <= len(matrix):
            raise ValueError(f"rank must be between 1 and {len(matrix)}, the size of the kernel; got {rank}")
        values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
        if values[-rank] <= len(matrix) * torch.finfo(values.dtype).eps * values[-1].clamp(min=0):
            raise UndefinedMetricError(f"{name} has fewer than {rank} positive eigenvalues")
        spans.append(vectors[:, -rank:])
    if spans[0].shape != spans[1].shape:
        raise ValueError(f"the kernels must have the same shape; got {tuple(K1.shape)} and {tuple(K2.shape)}")
    return torch.arccos(torch.linalg.svdvals(spans[0].T @ spans[1]).clamp(0, 1))


def eigenspace_overlap(K1: Kernel, K2: Kernel, rank: int) -> float:
    """Mean squared cosine of the :func:`principal_angles`: 1 for equal spans, rank / (n c) expected of random ones."""
    return float(principal_angles(K1, K2, rank).cos().square().mean())


def _pair(K1: Tensor, K2: Tensor) -> tuple[Tensor, Tensor]:
    """Both kernels as finite float64 matrices of one shape."""
    if K1.shape != K2.shape:
        raise ValueError(f"the kernels must have the same shape; got {tuple(K1.shape)} and {tuple(K2.shape)}")
    A, B = flatten(K1).double(), flatten(K2).double()
    for name, matrix in (("K1", A), ("K2", B)):
        if not torch.isfinite(matrix).all():
            raise ValueError(f"{name} holds NaN or infinite values")
    return A, B


def _square(kernel: Tensor) -> Tensor:
    matrix = flatten(kernel).double()
    if matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"expected a symmetric kernel, (n, n) or (n, n, c, c); got {tuple(kernel.shape)}")
    if not torch.isfinite(matrix).all():
        raise ValueError("the kernel holds NaN or infinite values")
    return matrix


def _norm(A: Tensor, name: str) -> Tensor:
    norm = A.norm()
    if norm == 0:
        raise UndefinedMetricError(
            f"{name} is zero: its parameters do not influence the outputs (or are constant after centring)"
        )
    return norm


def _best_scale(A: Tensor, B: Tensor) -> float:
    return float((A * B).sum() / _norm(B, "K2") ** 2)
