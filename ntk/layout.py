"""The layout of a kernel: reductions over its output axes and its flattened matrix."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ntk.checks import as_tensor, real_and_finite

# The entries of a symmetric kernel may differ from their mirror images by this, relative to the largest, by rounding.
ASYMMETRY = 1e-6

Kernel = Float[Tensor, "_ _ ..."] | Float[np.ndarray, "_ _ ..."]
"""``(n1, n2)`` or ``(n1, n2, c, c)``, as a tensor or an array; functions check the shape, for a better message."""


@dataclass(frozen=True)
class Layout:
    """How the c outputs of features ``(n, c, p)`` are arranged to contract them to a kernel.

    The outputs are split as c = k m d: k outputs have separate matrices, m have separate rows of a matrix, and d are
    summed together with the parameters. Every kernel is then k products of matrices ``(n m, d p)``, which compute no
    entry that the kernel does not have.

    Attributes:
        factors: c -> (k, m, d).
        shape: c -> the output axes of the kernel, which follow (n1, n2).
        summed: whether the outputs are summed before they are differentiated, so that c is 1 from there on.
    """

    factors: Callable[[int], tuple[int, int, int]]
    shape: Callable[[int], tuple[int, ...]]
    summed: bool = False

    def size(self, c: int) -> int:
        """Number of kernel entries of a pair of examples."""
        k, m, _ = self.factors(c)
        return k * m**2

    def arrange(self, features: Float[Tensor, "n c ..."]) -> Float[Tensor, "k nm dp"]:
        """The matrices that are multiplied; along their rows outputs vary faster than examples."""
        n, c, *rest = features.shape
        k, m, d = self.factors(c)
        return features.reshape(n, k, m, d, *rest).movedim(1, 0).reshape(k, n * m, d * torch.Size(rest).numel())

    def kernel(self, products: Float[Tensor, "k n1m n2m"], c: int) -> Float[Tensor, "n1 n2 ..."]:
        """The products as a kernel."""
        k, m, _ = self.factors(c)
        n1, n2 = (rows // m for rows in products.shape[1:])
        return products.reshape(k, n1, m, n2, m).permute(1, 3, 0, 2, 4).reshape(n1, n2, *self.shape(c))

    def contract(
        self, features1: Float[Tensor, "n1 c ..."], features2: Float[Tensor, "n2 c ..."]
    ) -> Float[Tensor, "n1 n2 ..."]:
        """The kernel of features; with ``summed``, the features are those of the summed outputs."""
        return self.kernel(self.arrange(features1) @ self.arrange(features2).mT, features1.shape[1])


# Values of the argument ``reduce`` of every function that computes kernels; see the table of `reduce_outputs`.
LAYOUTS: dict[str | None, Layout] = {
    None: Layout(lambda c: (1, c, 1), lambda c: (c, c)),
    "trace": Layout(lambda c: (1, 1, c), lambda c: ()),
    "diagonal": Layout(lambda c: (c, 1, 1), lambda c: (c,)),
    "sum": Layout(lambda c: (1, 1, c), lambda c: (), summed=True),
}


def layout_of(reduce: str | None) -> Layout:
    """The layout of a reduction.

    Raises:
        ValueError: there is no such reduction.
    """
    if reduce is not None and not (isinstance(reduce, str) and reduce in LAYOUTS):
        raise ValueError(f"reduce must be {', '.join(map(repr, LAYOUTS))}; got {reduce!r}")
    return LAYOUTS[reduce]


def reduce_outputs(kernel: Kernel, reduce: str | None) -> Float[Tensor, "..."]:
    """Contract the two output axes of a kernel ``(n1, n2, c, c)``.

    The reference for ``reduce=`` of :func:`ntk.empirical_ntk`, which does not form the c^2 entries of each pair.

    | ``reduce``     | result                    | shape          |
    |----------------|---------------------------|----------------|
    | ``None``       | K[i, j, a, b]             | (n1, n2, c, c) |
    | ``"trace"``    | sum_a K[i, j, a, a]       | (n1, n2)       |
    | ``"diagonal"`` | K[i, j, a, a]             | (n1, n2, c)    |
    | ``"sum"``      | sum_ab K[i, j, a, b]      | (n1, n2)       |

    ``"sum"`` is the kernel of the summed outputs, the pNTK of Mohamadi, Bae and Sutherland (2023, eq. 3) without
    their 1/c.
    """
    layout_of(reduce)
    kernel = as_tensor(kernel)
    if kernel.ndim != 4 or kernel.shape[2] != kernel.shape[3]:
        raise ValueError(f"expected a kernel of all pairs of outputs, (n1, n2, c, c); got {tuple(kernel.shape)}")
    match reduce:
        case "trace":
            return torch.einsum("ijaa->ij", kernel)
        case "diagonal":
            return torch.einsum("ijaa->ija", kernel).contiguous()
        case "sum":
            return kernel.sum(dim=(2, 3))
    return kernel


def mirrored(kernel: Float[Tensor, "n1 n2 ..."]) -> Float[Tensor, "n2 n1 ..."]:
    """The mirror image of a block of a symmetric kernel, K[j, i, b, a] = K[i, j, a, b], in any layout."""
    return kernel.permute(1, 0, 3, 2) if kernel.ndim == 4 else kernel.transpose(0, 1)


def flatten(kernel: Kernel) -> Float[Tensor, "rows columns"]:
    """The matrix of a kernel, in whose rows and columns outputs vary faster than examples.

    ``(n1, n2, c, c)`` becomes ``(n1*c, n2*c)``, positive semi-definite for a symmetric kernel; ``(n1, n2)`` is returned
    as it is. A ``(n1, n2, c)`` kernel holds c separate matrices and none of the blocks between them, so it raises
    ``ValueError``.
    """
    kernel = as_tensor(kernel)
    if kernel.ndim == 2:
        return kernel
    if kernel.ndim == 4 and kernel.shape[2] == kernel.shape[3]:
        n1, n2, c, _ = kernel.shape
        return kernel.transpose(1, 2).reshape(n1 * c, n2 * c)
    raise ValueError(
        f"flatten takes a kernel of shape (n1, n2, c, c) or (n1, n2); got {tuple(kernel.shape)}"
        + (": compare a reduce='diagonal' kernel output by output, kernel[..., a]" if kernel.ndim == 3 else "")
    )


def kernel_matrix(
    kernel: Kernel, name: str = "the kernel", *, square: bool = False, symmetric: bool = False
) -> Float[Tensor, "rows columns"]:
    """The flattened kernel in float64; with ``symmetric`` the mean of it and its transpose, which differ by rounding.

    Raises:
        TypeError: not a tensor.
        ValueError: a kernel that is complex or not finite, or of another shape; with ``square``, one that is not of
            examples with themselves; with ``symmetric``, entries that differ from their mirror images.
    """
    matrix = flatten(real_and_finite(kernel, name))
    if not (square or symmetric):
        return matrix
    if matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise ValueError(
            f"expected a square kernel, (n, n) or (n, n, c, c), of the examples with themselves; got {name} of shape "
            f"{tuple(kernel.shape)}"
        )
    if not symmetric:
        return matrix
    half = matrix / 2  # the sum of two entries may overflow, that of their halves does not
    difference, largest = 2 * float((half - half.T).abs().max()), float(matrix.abs().max())
    if difference > ASYMMETRY * largest:
        raise ValueError(
            f"expected a symmetric kernel; entries of {name} differ from their mirror images by up to "
            f"{difference:.3g}, and the largest is {largest:.3g}: take the kernel of the examples with themselves"
        )
    return half + half.T


def check_semidefinite(eigenvalues: Float[Tensor, "rows"], tolerance: float) -> None:
    """Raise ValueError if an ascending spectrum has an eigenvalue below -tolerance times the largest."""
    lowest, highest = float(eigenvalues[0]), float(eigenvalues[-1])
    if lowest < -tolerance * highest:
        raise ValueError(
            f"the kernel is not positive semi-definite: its eigenvalues go from {lowest:.3g} to {highest:.3g}. Take "
            "the tangent kernel of the examples with themselves, which has none below zero"
        )
