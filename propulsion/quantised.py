"""Layers with a quantised weight: which layers they are, and how z^k is merged into the scales of the weight.

bitsandbytes keeps one scale for each row of an 8-bit weight, and one for each block along the rows of a 4-bit weight.
A row is an output, so z^k multiplies those scales and leaves the integers unchanged: merging rounds a float32 scale
once, where quantising again would round the whole weight. Layers of other backends are adapted, but not merged.
"""

import copy
import importlib
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


def is_quantised_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer with integer weights of a backend such as GPTQ, AWQ, HQQ or EETQ."""
    if not all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features")):
        return False
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return any(not t.is_floating_point() for t in tensors)


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight is stored in another form than plain floating-point numbers."""
    return not weight.is_floating_point() or _kind(weight) != "" or type(weight).__module__.startswith("torchao")


def gather(base: nn.Module) -> None:
    """Put the scales of an 8-bit weight back on it: its layer moves them to a state of its own at the first call."""
    weight: Any = base.weight
    if _kind(weight) == "8bit" and weight.dtype == torch.int8:
        state: Any = base.state
        weight.SCB = state.SCB if weight.SCB is None else weight.SCB
        weight.CB = weight.data


def obstacle(weight: Any, scale: Float[Tensor, "d_out"], axis: int = 0) -> str | None:
    """The reason why z^k, along this axis, cannot be merged into a quantised weight; None if it can be."""
    kind = _kind(weight)
    if kind and axis != 0:
        return "it has one scale for each row, but its outputs are columns"
    if kind == "8bit" and weight.dtype == torch.int8:
        return None
    if kind == "4bit" and weight.quant_state is not None:
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            return "it has been packed for this processor"
        if weight.quant_state.shape[1] % weight.quant_state.blocksize:
            return f"its blocks of {weight.quant_state.blocksize} numbers run across rows"
        return "z^k is negative somewhere, and 4-bit numbers cannot be negated" if bool((scale < 0).any()) else None
    return "its backend has no scale for each output" if not kind else "it is not quantised yet"


def scaled(weight: Any, scale: Float[Tensor, "d_out"]) -> nn.Parameter:
    """The weight times z^k, one factor for each row; `obstacle` must have returned None."""
    scale = scale.float().to(weight.device)
    if _kind(weight) == "8bit":
        # The numbers are from -127 to 127, so that each can be negated.
        numbers = weight.data * scale.sign().where(scale != 0, 1.0).to(torch.int8)[:, None]
        return type(weight)(
            numbers, requires_grad=False, has_fp16_weights=False, CB=numbers, SCB=weight.SCB * scale.abs()
        )
    old = weight.quant_state
    absmax = old.absmax
    if old.nested:
        functional = importlib.import_module("bitsandbytes.functional")
        absmax = functional.dequantize_blockwise(old.absmax, old.state2) + old.offset
    merged, state = copy.copy(weight), copy.copy(old)
    state.absmax = absmax.float() * scale.repeat_interleave(old.shape[1] // old.blocksize)
    # The scales stay float32, since their second quantisation would round them.
    state.nested, state.state2, state.offset = False, None, None
    merged.quant_state, merged.compress_statistics = state, False
    return merged


def is_finite(weight: Any) -> bool:
    """Whether a weight, or the scales of a quantised one, are finite."""
    kind = _kind(weight)
    numbers = weight.SCB if kind == "8bit" else weight.quant_state.absmax if kind == "4bit" else weight
    return bool(numbers.isfinite().all())


def _kind(weight: Tensor) -> str:
    """ "8bit" or "4bit" for weights of bitsandbytes, else ""; by class name, since the package may not be installed."""
    return {"Int8Params": "8bit", "Params4bit": "4bit"}.get(type(weight).__name__, "")
