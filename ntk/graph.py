"""What capture puts into autograd's graph: where gradients are left, and a linear layer that skips what has none."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ntk.tokens import Gradients, Packing, not_zero


@runtime_checkable
class Passes(Protocol):
    """Backward passes, one for each output of the network.

    Attributes:
        output: whose pass runs.
    """

    output: int


@dataclass
class Received:
    """Gradients at the output of one operation, as the backward passes hand them over.

    Attributes:
        by_output: which of the network's outputs -> the gradient ``(n m, ...)``; held, not copied.
        real: the same -> its tokens that are not zero.
    """

    by_output: dict[int, Tensor] = field(default_factory=dict)
    real: dict[int, Tensor] = field(default_factory=dict)
    _all: Gradients | None = None

    def tokens(self, a: int) -> Tensor:
        """Which tokens of output a's gradient are not zero, bool."""
        if a not in self.real:
            self.real[a] = not_zero(self.by_output[a])
        return self.real[a]

    def all(self, c: int, packing: Packing) -> Gradients | None:
        """All c of them; None if no output depends on the operation."""
        if self._all is None and self.by_output:
            self._all = Gradients(self.by_output, c, packing, self.real)
        return self._all


class Product(torch.autograd.Function):
    """x W^T + b, whose backward pass leaves out tokens without a gradient where most have none, as in a last block.

    Its result is no view, as a linear layer's is: a view would have to be copied to be hooked.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, matrix: Tensor, bias: Tensor | None, received: Received, passes: Passes
    ) -> Tensor:
        """The layer, into memory of its own."""
        ctx.save_for_backward(matrix)
        ctx.received, ctx.passes = received, passes
        result = x.new_empty(*x.shape[:-1], len(matrix))
        flat, out = x.reshape(-1, x.shape[-1]), result.view(-1, len(matrix))
        if bias is None:
            torch.mm(flat, matrix.T, out=out)
        else:
            torch.addmm(bias, flat, matrix.T, out=out)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        """The gradient at x; zero where the output's is zero."""
        (matrix,) = ctx.saved_tensors
        received, a = ctx.received, ctx.passes.output
        # The hook on the result has left the gradient there, unless this operation had no rule.
        if a in received.by_output:
            real = received.tokens(a)
            places = real.nonzero().flatten()
            if len(places) < _FEW * len(real):
                rows = gradient.reshape(-1, gradient.shape[-1]).index_select(0, places) @ matrix
                whole = rows.new_zeros(len(real), rows.shape[-1]).index_copy_(0, places, rows)
                return whole.view(*gradient.shape[:-1], -1), None, None, None, None
        return gradient @ matrix, None, None, None, None


# Share of tokens below which leaving out the others saves more than gathering them costs.
_FEW = 0.5
# Linear layers, by their number of arguments -> what they multiply, the matrix W (r, s) and the bias.
_PRODUCTS: dict[tuple[Any, int], Callable[..., tuple[Tensor, Tensor, Tensor | None]]] = {
    (torch.nn.functional.linear, 2): lambda x, weight: (x, weight, None),
    (torch.nn.functional.linear, 3): lambda x, weight, bias: (x, weight, bias),
    (torch.addmm, 3): lambda bias, x, weight: (x, weight.T, bias),
}


def product(func: Any, args: tuple, kwargs: dict, received: Received, passes: Passes) -> Tensor | None:
    """The result of a call, if it is a linear layer with a constant matrix on data that takes a gradient; or None."""
    if (
        func not in _PRODUCTS
        or kwargs
        or not (len(args) == 3 or (len(args) == 2 and func is torch.nn.functional.linear))
    ):
        return None
    x, matrix, bias = _PRODUCTS[func](*args)
    if not isinstance(x, Tensor) or torch.is_autocast_enabled(x.device.type):
        return None
    constant = isinstance(matrix, Tensor) and matrix.ndim == 2 and not matrix.requires_grad
    if not constant or not x.requires_grad or x.ndim < 2 or x.dtype != matrix.dtype:
        return None
    if bias is not None and (bias.requires_grad or bias.dtype != x.dtype or bias.ndim != 1):
        return None
    return Product.apply(x, matrix, bias, received, passes)


class Root(torch.autograd.Function):
    """The identity, requiring a gradient for the anchor's sake alone."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, anchor: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The same tensor."""
        ctx.mark_dirty(result)
        ctx.dtype, ctx.device = anchor.dtype, anchor.device
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Nothing is needed of either."""
        return None, torch.zeros((), dtype=ctx.dtype, device=ctx.device)
