"""What capture puts into autograd's graph, and where gradients are left."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ntk.tokens import Gradients, Packing, not_zero


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
