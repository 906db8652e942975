"""The product of a layer's output and its scale, with less memory kept for the backward pass.

The gradient of the scale s is sum_t g_t v_t. Autograd would keep the unscaled output v for it, which nothing else
needs, in addition to the scaled output y = s v, which most following operations (attention, activations) keep for their
own gradients. Here y is kept, and the backward pass computes v_t = y_t / s. That is exact up to two roundings if s is
not small; if any |s| is below `SMALLEST`, v is kept as usual, so that the gradient is exact down to s = 0.

Once y is computed, v is not needed, and y may be written over it; the buffer of the products g_t y_t is used again for
the gradient of v. Allocating memory is most of the cost of such cheap operations.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

# Below this, y = s v could lose digits of v to underflow in float16.
SMALLEST = 1 / 16


class _ScaledOutput(torch.autograd.Function):
    """y = s v, whose backward pass computes v = y / s."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, scale: Tensor, overwrite: bool) -> Tensor:
        # A detached v shares its version counter with v, so that a backward pass that needs v raises.
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
    """Whether a transform of torch.func, or forward-mode differentiation, is active."""
    level: int = torch.autograd.forward_ad._current_level
    stack = torch._C._functorch.peek_interpreter_stack()  # pyright: ignore[reportAttributeAccessIssue]
    return stack is not None or level >= 0


def _is_batched(g: Tensor) -> bool:
    """Whether several gradients are computed at once (``is_grads_batched``), where buffers cannot be written into."""
    return torch._C._functorch.is_legacy_batchedtensor(g)  # pyright: ignore[reportAttributeAccessIssue]


def multiply(
    v: Float[Tensor, "..."], scale: Float[Tensor, "..."], *, lean: bool, overwrite: bool = False
) -> Float[Tensor, "..."]:
    """s v, rounded once to the dtype of v: in bfloat16 a scale of 1.002 would be 1.

    Args:
        v: the layer's output.
        scale: s, of a shape that broadcasts to v's, float32 or wider.
        lean: keep y for the backward pass. Allowed if |s| >= `SMALLEST`, and if y is not overwritten in place.
        overwrite: with `lean`, write y over v. Allowed if nothing else holds v.
    """
    return _ScaledOutput.apply(v, scale, overwrite) if lean else (v * scale).to(v.dtype)
