"""Multiplying a layer's output by its scale, with little kept for the backward pass.

The gradient of the scale s is sum_t g_t v_t. Autograd would keep the unscaled output v for it, which nothing else
needs, beside the scaled output y = s v, which most layers' successors (attention, activations) keep for gradients of
their own. Here y is kept, and v_t = y_t / s in the backward pass. That is exact but for two roundings where s is not
small; where any |s| is below `SMALLEST`, v is kept as usual, so that the gradient is exact down to s = 0.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

# Below this, y = s v could lose digits of v to underflow in float16.
SMALLEST = 1 / 16


class _ScaledOutput(torch.autograd.Function):
    """y = s v, from which the backward pass takes v = y / s."""

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor, scale: Tensor) -> Tensor:
        return (v * scale).to(v.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output, inputs[1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor]:
        (g,) = grad_outputs
        y, scale = ctx.saved_tensors
        to_v = (g * scale).to(g.dtype) if ctx.needs_input_grad[0] else None
        return to_v, (g.to(scale.dtype) * y).sum_to_size(scale.shape) / scale


def multiply(v: Float[Tensor, "..."], scale: Float[Tensor, "..."], *, lean: bool) -> Float[Tensor, "..."]:
    """s v, rounded once to the dtype of v: in bfloat16 a scale of 1.002 would be 1.

    Args:
        v: the layer's output.
        scale: s, of a shape that broadcasts to v's, float32 or wider.
        lean: keep y for the backward pass. Only for |s| >= `SMALLEST`, and for outputs that nobody overwrites in place.
    """
    return _ScaledOutput.apply(v, scale) if lean else (v * scale).to(v.dtype)
