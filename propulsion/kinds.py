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
    def weight(self) -> Tensor:
        """Of the layer beneath; of backends that have none, what they keep in its place."""
        base: Any = self.get_base_layer()
        found = next((w for name in ("weight", "qweight", "W_q") if (w := getattr(base, name, None)) is not None), None)
        return next(t for t in (*base.parameters(), *base.buffers())) if found is None else found

    def probe(self) -> Tensor | None:
        """Two inputs."""
        x = torch.linspace(-1, 1, 2 * self.in_features, device=self.weight.device, dtype=self.weight.dtype)
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
        return torch.arange(min(4, len(self.weight)), device=self.weight.device)[None]


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
        return self.weight.ndim - 2


class PropulsionNorm(PropulsionLayer):
    """Over `torch.nn.LayerNorm`, and RMSNorms of any family: weight (d_out,), and a bias perhaps.

    Families multiply by the weight, or by one plus it (Gemma). Which, is found by trying when it comes to merging.
    """

    weight_axis = 0

    def features(self) -> tuple[int, int]:
        """The normalised axis."""
        return self.weight.numel(), self.weight.numel()

    @torch.no_grad()
    def _scaled(self, parameters: dict[str, nn.Parameter], adapter_names: list[str]) -> dict[str, nn.Parameter]:
        scale = self.scale(adapter_names)
        assert scale is not None
        base, weight = self.get_base_layer(), parameters["weight"]
        current = {name: getattr(base, name) for name in parameters}
        x = torch.linspace(-1, 1, self.out_features, device=weight.device, dtype=weight.dtype)
        x = torch.stack([x, x.roll(1).cos()])
        # Many norms compute in float32, whatever the dtype of their weight.
        tolerance = 8 * max(torch.finfo(dtype).eps for dtype in (weight.dtype, torch.float32))
        try:
            self._put(base, parameters)
            expected = (base(x) * scale).to(weight.dtype)
            found = []
            for shift in (0, 1):
                values = {name: p * scale for name, p in parameters.items()}
                values["weight"] = (weight.to(scale.dtype) + shift) * scale - shift
                merged = {
                    name: nn.Parameter(value.to(parameters[name].dtype), requires_grad=parameters[name].requires_grad)
                    for name, value in values.items()
                }
                self._put(base, merged)
                found.append((float((base(x) - expected).abs().max()), merged))
        finally:
            self._put(base, current)
        error, merged = min(found, key=lambda pair: pair[0])
        size = float(expected.abs().max() + (1 + weight.abs().max()) * scale.abs().max())
        if error <= tolerance * size or not expected.isfinite().all():
            return merged
        raise ValueError(
            f"expected a norm that multiplies by its weight, or by one plus it, to merge into; {type(base).__name__} "
            "does neither: keep the adapter unmerged"
        )


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
