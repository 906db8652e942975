"""Which layer of Propulsion adapts which kind of module."""

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

    def features(self) -> tuple[int, int]:
        """As the layer says: a quantised weight is packed."""
        base: Any = self.get_base_layer()
        return base.in_features, base.out_features

    @property
    def base_weight(self) -> Tensor:
        """Weight of the layer beneath; of backends that have none, what they keep in its place."""
        base: Any = self.get_base_layer()
        found = next((w for name in ("weight", "qweight", "W_q") if (w := getattr(base, name, None)) is not None), None)
        return next(t for t in (*base.parameters(), *base.buffers())) if found is None else found

    def probe(self) -> Tensor | None:
        """Two inputs."""
        x = torch.linspace(-1, 1, 2 * self.in_features, device=self.base_weight.device, dtype=self.base_weight.dtype)
        return x.reshape(2, -1)


class PropulsionTransposedLinear(PropulsionLayer):
    """Over `transformers.pytorch_utils.Conv1D`, GPT-2's Linear: weight (d_in, d_out).

    The name holds "Linear" because peft's "all-linear" finds adapted Linears by the name of their class.
    """

    weight_axis = 1


class PropulsionEmbedding(PropulsionLayer):
    """Over `torch.nn.Embedding`: weight (vocabulary, d_out). A padding row is scaled like any other."""

    weight_axis = 1

    def features(self) -> tuple[int, int]:
        """As the layer says: a quantised weight is packed."""
        base: Any = self.get_base_layer()
        return base.num_embeddings, base.embedding_dim

    def probe(self) -> Tensor | None:
        """Some of the vocabulary."""
        return torch.arange(min(4, len(self.base_weight)), device=self.base_weight.device)[None]


class PropulsionConvolution(PropulsionLayer):
    """Over `torch.nn.Conv1d`, `Conv2d`, `Conv3d`: weight (d_out, d_in / groups, ...), one z for each output channel."""

    weight_axis = 0

    def features(self) -> tuple[int, int]:
        """Channels."""
        base: Any = self.get_base_layer()
        return base.in_channels, base.out_channels

    @property
    def kernel_axes(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """One, two or three."""
        return self.base_weight.ndim - 2


class PropulsionNorm(PropulsionLayer):
    """Over `torch.nn.LayerNorm`, and RMSNorms of any family: weight (d_out,), and a bias perhaps.

    Families multiply by the weight, or by one plus it (Gemma). Which, is found by trying when it comes to merging.
    """

    weight_axis = 0
    _added: int | None = None

    def features(self) -> tuple[int, int]:
        """The normalised axis."""
        return self.base_weight.numel(), self.base_weight.numel()

    def _times(self, name: str, value: Tensor, scale: Tensor) -> Tensor:
        if name == "bias":
            return super()._times(name, value, scale)
        shift = self._shift()
        return ((value.to(scale.dtype) + shift) * scale.to(value.device) - shift).to(value.dtype)

    @torch.no_grad()
    def _shift(self) -> int:
        """What the norm adds to its weight before it multiplies by it, 0 or 1; found by trying, once.

        Raises:
            ValueError: it is neither.
        """
        base: Any = self.get_base_layer()
        if base.weight.is_meta or (isinstance(base, (nn.LayerNorm, nn.RMSNorm)) and _has_forward_of_torch(base)):
            return 0
        if self._added is None:
            found = {shift: _error_of(base, shift) for shift in (0, 1)}
            shift = min(found, key=lambda shift: found[shift])
            if found[shift] > 1:
                raise ValueError(
                    f"expected a norm that multiplies by its weight, or by one plus it, to merge into or to be read; "
                    f"{type(base).__name__} does neither: keep the adapter unmerged, or leave the norm out"
                )
            self._added = shift
        return self._added


def _has_forward_of_torch(base: nn.Module) -> bool:
    return type(base).forward.__module__.startswith("torch.nn.")


def _error_of(base: Any, shift: int) -> float:
    """How far a norm is from one that multiplies by its weight plus `shift`: in units of rounding, below 1 if it is."""
    parameters = {name: p for name in ("weight", "bias") if (p := getattr(base, name, None)) is not None}
    weight = parameters["weight"]
    wide = torch.promote_types(weight.dtype, torch.float32)
    x = torch.linspace(-1, 1, weight.numel(), device=weight.device, dtype=weight.dtype)
    x = torch.stack([x, x.roll(1).cos()])
    # A weight and a scale of several sizes; the norm's own weight may be of zeros.
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
        return float("inf")  # Called in a way of its own.
    finally:
        for name, p in parameters.items():
            setattr(base, name, p)
    # Many norms compute in float32, whatever the dtype of their weight.
    precision = 32 * max(torch.finfo(dtype).eps for dtype in (weight.dtype, torch.float32))
    error = (outputs[1] - outputs[0] * scale).abs().max() / (precision * outputs[1].abs().max())
    return float(error)


LAYERS: dict[type[nn.Module], type[PropulsionLayer]] = {
    nn.Linear: PropulsionLinear,
    Conv1D: PropulsionTransposedLinear,
    nn.Embedding: PropulsionEmbedding,
    nn.Conv1d: PropulsionConvolution,
    nn.Conv2d: PropulsionConvolution,
    nn.Conv3d: PropulsionConvolution,
    nn.LayerNorm: PropulsionNorm,
    nn.RMSNorm: PropulsionNorm,
}


def layer_class(module: nn.Module) -> type[PropulsionLayer] | None:
    """Return the class that adapts this module; None if none does."""
    found = next((layer for kind, layer in LAYERS.items() if isinstance(module, kind)), None)
    if found is PropulsionNorm or (found is None and is_norm(module)):
        return PropulsionNorm if is_norm(module) else None
    if found is None and quantised.is_quantised_linear(module):
        return PropulsionLinear
    return found
