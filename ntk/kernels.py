"""The layout of a kernel: reductions over its output axes and its flattened matrix."""

import torch
from jaxtyping import Float
from torch import Tensor

Kernel = Float[Tensor, "_ _ ..."]
"""``(n1, n2)`` or ``(n1, n2, c, c)``; functions check the shapes they need themselves, to say what came instead."""

REDUCTIONS = ("trace", "diagonal", "sum")


def reduce_outputs(kernel: Float[Tensor, "n1 n2 c c"], reduce: str | None) -> Float[Tensor, "..."]:
    """Contract the two output axes of a kernel.

    | ``reduce``     | result                    | shape          |
    |----------------|---------------------------|----------------|
    | ``None``       | K[i, j, a, b]             | (n1, n2, c, c) |
    | ``"trace"``    | sum_a K[i, j, a, a]       | (n1, n2)       |
    | ``"diagonal"`` | K[i, j, a, a]             | (n1, n2, c)    |
    | ``"sum"``      | sum_ab K[i, j, a, b]      | (n1, n2)       |

    ``"sum"`` is the kernel of the summed outputs, the pNTK of Mohamadi, Bae and Sutherland (2023, eq. 3) without
    their 1/c.
    """
    match reduce:
        case None:
            return kernel
        case "trace":
            return torch.einsum("ijaa->ij", kernel)
        case "diagonal":
            return torch.einsum("ijaa->ija", kernel).contiguous()
        case "sum":
            return kernel.sum(dim=(2, 3))
    raise ValueError(f"unknown reduction {reduce!r}")


def flatten(kernel: Kernel) -> Float[Tensor, "rows columns"]:
    """The matrix of a kernel, examples slow and outputs fast.

    ``(n1, n2, c, c)`` becomes ``(n1*c, n2*c)``, positive semi-definite for a symmetric kernel; ``(n1, n2)`` is returned
    as it is. A ``(n1, n2, c)`` kernel holds c separate matrices and none of the blocks between them, so it raises
    ``ValueError``.
    """
    if kernel.ndim == 2:
        return kernel
    if kernel.ndim == 4 and kernel.shape[2] == kernel.shape[3]:
        n1, n2, c, _ = kernel.shape
        return kernel.transpose(1, 2).reshape(n1 * c, n2 * c)
    raise ValueError(
        f"flatten takes a kernel of shape (n1, n2, c, c) or (n1, n2); got {tuple(kernel.shape)}"
        + (": compare a reduce='diagonal' kernel output by output, kernel[..., a]" if kernel.ndim == 3 else "")
    )
