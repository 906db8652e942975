"""Multiplying a layer's output by its scale, with little kept for the backward pass and little written.

The gradient of the scale s is sum_t g_t v_t. Autograd would keep the unscaled output v for it, which nothing else
needs, beside the scaled output y = s v, which most layers' successors (attention, activations) keep for gradients of
their own. Here y is kept, and v_t = y_t / s in the backward pass. That is exact but for two roundings where s is not
small; where any |s| is below `SMALLEST`, v is kept as usual, so that the gradient is exact down to s = 0.

v is then of no use once y is formed, so that y may take its place in memory; and the buffer of the products g_t y_t
that are summed becomes the gradient of v. Fresh memory is what such cheap operations spend their time on.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

# Below this, y = s v could lose digits of v to underflow in float16.
SMALLEST = 1 / 16


class _ScaledOutput(torch.autograd.Function):
    """y = s v, from which the backward pass takes v = y / s."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, scale: Tensor, overwrite: bool) -> Tensor:
        # A detached v shares its count of changes with v: a backward pass that needs v after all raises.
        y = v.detach().mul_(scale) if overwrite else (v * scale).to(v.dtype)
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (g,) = grad_outputs
        try:
            y, scale = ctx.saved_tensors
        except RuntimeError as error:
            if "inplace operation" not in str(error):
                raise
            raise RuntimeError(
                "the model writes into the output of a layer with Propulsion, which the lean layer keeps for its "
                f"gradient: use PropulsionConfig(lean=False) ({error})"
            ) from None
        products = g.to(scale.dtype) * y
        to_scale = products.sum_to_size(scale.shape) / scale if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, to_scale, None
        if products.dtype == g.dtype and not (torch.is_grad_enabled() or transforms_active() or _is_batched(g)):
            return torch.mul(g, scale, out=products), to_scale, None
        return (g * scale).to(g.dtype), to_scale, None


def transforms_active() -> bool:
    """Whether a transform of torch.func, or forward-mode differentiation, is looking on."""
    level: int = torch.autograd.forward_ad._current_level
    stack = torch._C._functorch.peek_interpreter_stack()  # pyright: ignore[reportAttributeAccessIssue]
    return stack is not None or level >= 0


def _is_batched(g: Tensor) -> bool:
    """Whether several gradients are taken at once (``is_grads_batched``), which writes into no buffer."""
    return torch._C._functorch.is_legacy_batchedtensor(g)  # pyright: ignore[reportAttributeAccessIssue]


def multiply(
    v: Float[Tensor, "..."], scale: Float[Tensor, "..."], *, lean: bool, overwrite: bool = False
) -> Float[Tensor, "..."]:
    """s v, rounded once to the dtype of v: in bfloat16 a scale of 1.002 would be 1.

    Args:
        v: the layer's output.
        scale: s, of a shape that broadcasts to v's, float32 or wider.
        lean: keep y for the backward pass. Only for |s| >= `SMALLEST`, and for outputs that nobody overwrites in place.
        overwrite: with `lean`, let y take v's memory. Only for a v that nobody else holds.
    """
    return _ScaledOutput.apply(v, scale, overwrite) if lean else (v * scale).to(v.dtype)
