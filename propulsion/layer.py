"""The layer of Propulsion: y = z^k * v (Kowsher et al. 2024, Eq. 1-3)."""

import warnings
from typing import Any

import torch
from jaxtyping import Float
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from propulsion.config import PropulsionConfig

_NOISE = 0.02


def power(z: Float[Tensor, "d_out"], degree: int | float) -> Float[Tensor, "d_out"]:
    """The scale: z^k for an integer degree k, sign(z) |z|^k for another, in float32 or wider.

    The second form agrees with the first at odd k, increases with z everywhere and is never NaN; nor is its gradient,
    k |z|^(k-1), which is taken as 0 at z = 0.
    """
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    if isinstance(degree, int):
        return z**degree
    # The inner where keeps autograd from forming 0 * inf at z = 0.
    nonzero = z != 0
    return torch.where(nonzero, z.sign() * torch.where(nonzero, z.abs(), 1.0) ** degree, 0.0)


class PropulsionLayer(nn.Module, BaseTunerLayer):
    """A frozen layer whose output v, bias included, is multiplied by z^k, one z (d_out,) per adapter.

    z is float32 whatever the dtype of the layer, as 1 + 1e-3 is 1 in bfloat16, and float64 over a float64 layer.
    Several active adapters multiply.

    Merging replaces the layer's Parameter objects and keeps the old ones: unmerging restores their bits (z = 0
    included), and another module that shares a parameter, as a tied head does, keeps the old one and so its function.
    A merged layer thus holds its weight twice until it is unmerged or unloaded.

    Abstract: a subclass says along which axis of the weight the outputs lie.
    """

    adapter_layer_names = ("propulsion_z",)
    other_param_names = ("degree",)

    output_axis: int

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: PropulsionConfig):
        super().__init__()
        self.base_layer = base_layer
        self.propulsion_z = nn.ParameterDict()
        self.degree: dict[str, int | float] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._unmerged: dict[str, nn.Parameter] = {}
        self._active_adapter = adapter_name
        shape = self.weight.shape
        self.in_features: int = shape[1 - self.output_axis]
        self.out_features: int = shape[self.output_axis]
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: PropulsionConfig) -> None:
        """Add an adapter."""
        weight = self.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        z = torch.ones(self.out_features, dtype=dtype)
        if not config.init_weights:
            z += _NOISE * torch.randn(self.out_features, dtype=dtype)
        self.propulsion_z[adapter_name] = nn.Parameter(z.to(weight.device))
        self.degree[adapter_name] = config.degree
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def scale(self, adapter_names: list[str]) -> Float[Tensor, "d_out"] | None:
        """The product of z^k over those of the named adapters that this layer has; None if it has none."""
        scale = None
        for name in adapter_names:
            if name in self.propulsion_z:
                factor = power(self.propulsion_z[name], self.degree[name])
                scale = factor if scale is None else scale * factor
        return scale

    def forward(self, *args: Any, **kwargs: Any) -> Float[Tensor, "*batch d_out"]:
        """Return z^k * v; v alone when disabled, and what the merged weight gives when merged."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        output = self.base_layer(*args, **kwargs)
        if self.disable_adapters or self.merged:
            return output
        scale = self.scale(self.active_adapters)
        return output if scale is None else output * scale.to(output.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold z^k into the weight and bias: W' = diag(z^k) W, b' = z^k * b.

        Args:
            safe_merge: Refuse a merged weight that is not finite.
            adapter_names: Adapters to merge; the active ones if None.

        Raises:
            ValueError: the weight is quantised, an embedding renormalises its rows, or `safe_merge` found a
                non-finite value. The layer is then as it was.
        """
        adapter_names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.propulsion_z]
        if not adapter_names:
            return
        base = self.get_base_layer()
        # A further merge starts again from the unmerged weight, so that it rounds only once.
        unmerged = self._unmerged or {
            name: parameter for name in ("weight", "bias") if (parameter := getattr(base, name, None)) is not None
        }
        self._check_mergeable(base, unmerged["weight"])
        adapter_names = [*self.merged_adapters, *adapter_names]
        merged = self._scaled(unmerged, adapter_names)
        if safe_merge and not all(value.isfinite().all() for value in merged.values()):
            raise ValueError(
                f"expected finite merged weights, got some that are not from adapters {adapter_names}: z or the weight "
                f"is broken, or z^k overflows {unmerged['weight'].dtype}. Nothing was merged"
            )
        for name, value in merged.items():
            setattr(base, name, nn.Parameter(value, requires_grad=unmerged[name].requires_grad))
        self._unmerged = unmerged
        self.merged_adapters = adapter_names

    def unmerge(self) -> None:
        """Put the weight and bias back that `merge` replaced, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base = self.get_base_layer()
        for name, parameter in self._unmerged.items():
            merged = getattr(base, name)
            # The model may have moved since; the stash, which is no part of it, follows only now.
            parameter.data = parameter.data.to(merged.device, merged.dtype)
            setattr(base, name, parameter)
        self._unmerged = {}
        self.merged_adapters = []

    @torch.no_grad()
    def _scaled(self, parameters: dict[str, nn.Parameter], adapter_names: list[str]) -> dict[str, Tensor]:
        """The weight and bias times the scale, computed in the wider dtype of the two and rounded once."""
        scale = self.scale(adapter_names)
        assert scale is not None
        along = {"weight": scale[:, None] if self.output_axis == 0 else scale, "bias": scale}
        return {name: (p * along[name].to(p.device)).to(p.dtype) for name, p in parameters.items()}

    def _check_mergeable(self, base: nn.Module, weight: Tensor) -> None:
        if not weight.is_floating_point():
            raise ValueError(
                f"expected a floating-point weight to merge into, got a quantised {type(base).__name__} of dtype "
                f"{weight.dtype}: dequantise the model, or keep the adapter unmerged"
            )
        if getattr(base, "max_norm", None) is not None:
            raise ValueError(
                "expected an Embedding without max_norm to merge into, as it would renormalise the merged rows: keep "
                "the adapter unmerged"
            )

    def __repr__(self) -> str:
        return "propulsion." + super().__repr__()


class PropulsionLinear(PropulsionLayer):
    """Over `torch.nn.Linear`: weight (d_out, d_in)."""

    output_axis = 0


class PropulsionTransposedLinear(PropulsionLayer):
    """Over `transformers.pytorch_utils.Conv1D`, GPT-2's Linear: weight (d_in, d_out).

    The name holds "Linear" because peft's "all-linear" finds adapted Linears by the name of their class.
    """

    output_axis = 1


class PropulsionEmbedding(PropulsionLayer):
    """Over `torch.nn.Embedding`: weight (vocabulary, d_out). A padding row is scaled like any other."""

    output_axis = 1


LAYERS: dict[type[nn.Module], type[PropulsionLayer]] = {
    nn.Linear: PropulsionLinear,
    Conv1D: PropulsionTransposedLinear,
    nn.Embedding: PropulsionEmbedding,
}


def layer_class(module: nn.Module) -> type[PropulsionLayer] | None:
    """Return the class that adapts this module; None if none does."""
    return next((layer for kind, layer in LAYERS.items() if isinstance(module, kind)), None)
