"""The layer of Propulsion for each kind of module."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from propulsion import quantised
from propulsion.layer import PropulsionLayer
from propulsion.positions import is_norm


class PropulsionLinear(PropulsionLayer):
    """Over `torch.nn.Linear` and its quantised relatives: weight (d_out, d_in)."""

    weight_axis = 0
    rotates = True

    def features(self) -> tuple[int, int]:
        """(d_in, d_out) as the layer has them, since a quantised weight is packed."""
        base: Any = self.get_base_layer()
        return base.in_features, base.out_features

    @property
    def base_weight(self) -> Tensor:
        """The weight of the layer beneath, or the tensor that a quantisation backend stores in its place."""
        base: Any = self.get_base_layer()
        named = (getattr(base, name, None) for name in ("weight", "qweight", "W_q"))
        return next(t for t in (*named, *base.parameters(), *base.buffers()) if t is not None)

    def probe(self) -> Tensor | None:
        """Two test inputs, (2, d_in)."""
        x = torch.linspace(-1, 1, 2 * self.in_features, device=self.base_weight.device, dtype=self.base_weight.dtype)
        return x.reshape(2, -1)


class PropulsionTransposedLinear(PropulsionLayer):
    """Over `transformers.pytorch_utils.Conv1D`, GPT-2's Linear: weight (d_in, d_out).

    "Linear" is in the name because peft's "all-linear" finds adapted Linears by the name of their class.
    """

    weight_axis = 1
    rotates = True


class PropulsionEmbedding(PropulsionLayer):
    """Over `torch.nn.Embedding`: weight (vocabulary, d_out). A padding row is scaled like any other."""

    weight_axis = 1
    rotates = True

    def probe(self) -> Tensor | None:
        """The first token ids of the vocabulary, at most four: (1, t)."""
        return torch.arange(min(4, len(self.base_weight)), device=self.base_weight.device)[None]


class PropulsionConvolution(PropulsionLayer):
    """Over `torch.nn.Conv1d`, `Conv2d`, `Conv3d`: weight (d_out, d_in / groups, ...), one z for each output channel."""

    weight_axis = 0

    def features(self) -> tuple[int, int]:
        """(input channels, output channels)."""
        base: Any = self.get_base_layer()
        return base.in_channels, base.out_channels

    @property
    def kernel_axes(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Number of spatial axes: 1, 2 or 3."""
        return self.base_weight.ndim - 2


class PropulsionNorm(PropulsionLayer):
    """Over `torch.nn.LayerNorm`, and RMSNorms of any family: weight (d_out,), with or without a bias.

    Some families multiply by the weight, others (Gemma) by one plus the weight. A test before merging tells which.
    """

    weight_axis = 0
    _added: int | None = None

    def features(self) -> tuple[int, int]:
        """(d_out, d_out), of the normalised axis."""
        return self.base_weight.numel(), self.base_weight.numel()

    def _times(self, name: str, value: Tensor, scale: Tensor, basis: int | None = None) -> Tensor:
        assert basis is None  # a norm's weight is one number for each output, and is not adapted in a rotated basis
        if name == "bias":
            return super()._times(name, value, scale)
        shift = self._shift()
        return ((value.to(scale.dtype) + shift) * scale.to(value.device) - shift).to(value.dtype)

    @torch.no_grad()
    def _shift(self) -> int:
        """The number, 0 or 1, that the norm adds to its weight before it multiplies; a test call finds it.

        Raises:
            ValueError: the norm multiplies by neither.
        """
        base: Any = self.get_base_layer()
        forward_of_torch = type(base).forward.__module__.startswith("torch.nn.")
        if base.weight.is_meta or (isinstance(base, (nn.LayerNorm, nn.RMSNorm)) and forward_of_torch):
            return 0
        if self._added is None:
            errors = {shift: _error_of(base, shift) for shift in (0, 1)}
            shift = min(errors, key=lambda shift: errors[shift])
            if errors[shift] > 1:
                raise ValueError(
                    f"expected a norm that multiplies by its weight, or by one plus it, to merge into or to be read; "
                    f"{type(base).__name__} does neither: keep the adapter unmerged, or leave the norm out"
                )
            self._added = shift
        return self._added


def _error_of(base: Any, shift: int) -> float:
    """How far a norm is from multiplying by its weight plus `shift`, in rounding errors; inf if it cannot be called."""
    parameters = {name: p for name in ("weight", "bias") if (p := getattr(base, name, None)) is not None}
    weight = parameters["weight"]
    wide = torch.promote_types(weight.dtype, torch.float32)
    x = torch.linspace(-1, 1, weight.numel(), device=weight.device, dtype=weight.dtype)
    x = torch.stack([x, x.roll(1).cos()])
    # The test replaces the norm's own weight, which may be zero.
    scale = 1.5 + torch.linspace(-3, 3, weight.numel(), device=weight.device, dtype=wide).sin()
    first = {name: torch.ones_like(p) + 0.5 * x[0] for name, p in parameters.items()}
    second = {name: p * scale for name, p in first.items()}
    second["weight"] = (first["weight"] + shift) * scale - shift
    outputs = []
    try:
        for values in (first, second):
            for name, value in values.items():
                setattr(base, name, nn.Parameter(value.to(weight.dtype), requires_grad=False))
            outputs.append(base(x).to(wide))
    except (TypeError, IndexError, RuntimeError):
        return float("inf")  # Its forward takes other arguments.
    finally:
        for name, p in parameters.items():
            setattr(base, name, p)
    # Many norms compute in float32 for weights of any dtype.
    precision = 32 * max(torch.finfo(dtype).eps for dtype in (weight.dtype, torch.float32))
    return float((outputs[1] - outputs[0] * scale).abs().max() / (precision * outputs[1].abs().max()))


LAYERS: dict[type[nn.Module], type[PropulsionLayer]] = {
    nn.Linear: PropulsionLinear,
    Conv1D: PropulsionTransposedLinear,
    nn.Embedding: PropulsionEmbedding,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), PropulsionConvolution),
    **dict.fromkeys((nn.LayerNorm, nn.RMSNorm), PropulsionNorm),
}


def layer_class(module: nn.Module) -> type[PropulsionLayer] | None:
    """Return the class that adapts this module; None if none does."""
    adapter_class = next((layer for kind, layer in LAYERS.items() if isinstance(module, kind)), None)
    if adapter_class in (None, PropulsionNorm) and is_norm(module):
        return PropulsionNorm
    if adapter_class is None and quantised.is_quantised_linear(module):
        return PropulsionLinear
    return None if adapter_class is PropulsionNorm else adapter_class
