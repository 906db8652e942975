"""Functions in autograd's graph that leave gradients behind."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ntk.tokens import Gradients, Packing, not_zero


@dataclass
class Received:
    """Gradients at the output of one operation, as the backward passes hand them over.

    Attributes:
        by_output: index of an output of the network -> the gradient ``(n m, ...)``; held, not copied.
        real: index of an output -> which tokens of its gradient are not zero.
    """

    by_output: dict[int, Tensor] = field(default_factory=dict)
    real: dict[int, Tensor] = field(default_factory=dict)
    _all: Gradients | None = None

    def tokens(self, a: int) -> Tensor:
        """A mask of the tokens at which the gradient of output a is not zero."""
        if a not in self.real:
            self.real[a] = not_zero(self.by_output[a])
        return self.real[a]

    def all(self, c: int, packing: Packing) -> Gradients | None:
        """The gradients of all c outputs; None if no output depends on the operation."""
        if self._all is None and self.by_output:
            self._all = Gradients(self.by_output, c, packing, self.real)
        return self._all


class Root(torch.autograd.Function):
    """The identity on a tensor, with an anchor that makes the result require a gradient."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, anchor: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the same tensor."""
        ctx.mark_dirty(result)
        ctx.dtype, ctx.device = anchor.dtype, anchor.device
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """No gradient for the tensor; zero for the anchor."""
        return None, torch.zeros((), dtype=ctx.dtype, device=ctx.device)
