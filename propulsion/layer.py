"""The layer of Propulsion: y = z^k * v (Kowsher et al. 2024, Eq. 1-3)."""

import threading
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from propulsion import quantised
from propulsion.config import PropulsionConfig
from propulsion.outside_reads import OfSeveralAdapters
from propulsion.rotation import scaled_in_basis
from propulsion.scale import initial_vectors, scale_of
from propulsion.scaled_output import SMALLEST, multiply, transforms_active

_NOISE = 0.02
BASE = "__base__"  # peft's name, in a list of adapter names, for the model without adapters


class Scales(nn.ParameterDict):
    """The vectors z of a layer, by adapter. They move with the layer, and are never cast below float32."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Scales":
        def wide(z: Tensor) -> Tensor:
            moved = fn(z)
            narrow = moved.is_floating_point() and moved.element_size() < 4
            return z.to(moved.device, torch.float32) if narrow and z.is_floating_point() else moved

        return super()._apply(wide, recurse)


class PropulsionLayer(nn.Module, BaseTunerLayer):
    """A frozen layer whose output v, bias included, is multiplied by z^k.

    Each adapter has one z: a vector (d_out,), or several (p, d_out) whose scales are pooled. z is float32 unless the
    layer is float64, and stays so when the model is cast, since 1 + 1e-3 is 1 in bfloat16. The scales of several active
    adapters are multiplied.

    Merging replaces the layer's parameters and keeps the old ones. So unmerging restores them bit for bit, also where
    z = 0, and a module that shares a parameter, such as a tied head, keeps the old one. A merged layer holds its weight
    twice until it is unmerged or unloaded. A quantised weight merges into its own scales if it has one for each output
    (`propulsion.quantised`).

    Some models read the layer's `weight` and `bias` and do not call it, as fused kernels, Mamba and tied readouts do.
    They read weights multiplied by z^k, as if the layer were merged, and gradients reach z. Other attributes are those
    of the layer beneath.

    This class is abstract. A subclass sets `weight_axis`, the axis of the weight that numbers the output features, and
    `kernel_axes`, the number of axes after that of the features in the layer's output.
    """

    adapter_layer_names = ("propulsion_z",)
    other_param_names = ("degree", "pooling", "basis")

    weight_axis: int
    kernel_axes: int = 0
    rotates: bool = False  # whether the scales may act in a rotated basis of the output's last axis

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: PropulsionConfig, name: str = "", *,
                 lean: bool | None = None):  # fmt: skip
        super().__init__()
        self.degree: dict[str, int | float] = {}
        self.pooling: dict[str, str] = {}
        self.basis: dict[str, int | None] = {}  # The seed of a rotated basis, by adapter; None for coordinates.
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._unmerged: dict[str, nn.Parameter] = {}
        self._active_adapter = adapter_name
        self._lean = False
        self._far: tuple[tuple, bool] = ((), False)
        self._together: list[PropulsionLayer] = []
        self._key = name
        self._was_read = False
        self._of_examples: dict[int, list[str]] = {}  # By the thread that runs the batch.
        # Last, since attributes that the layer beneath has would be set on it (`__setattr__`).
        self.base_layer = base_layer
        self.propulsion_z = Scales()
        self.update_layer(adapter_name, config, name, lean=lean)

    def features(self) -> tuple[int, int]:
        """(d_in, d_out) of the layer beneath."""
        shape = self.base_weight.shape
        return shape[1 - self.weight_axis], shape[self.weight_axis]

    @property
    def in_features(self) -> int:
        """d_in."""
        return self.features()[0]

    @property
    def out_features(self) -> int:
        """d_out."""
        return self.features()[1]

    @property
    def base_weight(self) -> Tensor:
        """The weight of the layer beneath."""
        return self.get_base_layer().weight  # pyright: ignore[reportReturnType]

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The weight with which the layer beneath would compute the scaled output: diag(z^k) W, formed at each read.

        If no adapter is active, or the layer is merged or quantised, it is the stored weight of the layer beneath.

        Raises:
            ValueError: the layer beneath is a norm that does not multiply by its weight, nor by one plus it.
        """
        return self._as_read("weight")

    @property
    def bias(self) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The bias z^k * b, formed at each read, with the exceptions of `weight`."""
        return self._as_read("bias")

    def _as_read(self, name: str) -> Any:
        if self.disable_adapters and self.merged:
            self.unmerge()
        value: Any = self.base_weight if name == "weight" else self.get_base_layer().bias
        if value is None or self.disable_adapters or self.merged or quantised.is_quantised(value):
            return value
        mixed = self._of_examples.get(threading.get_ident()) if self._of_examples else None
        names = self.active_adapters if mixed is None else mixed
        if mixed is not None and len(set(mixed)) > 1 and set(mixed) & set(self.propulsion_z):
            return OfSeveralAdapters.of(value, self._key)
        scale = self.scale(list(dict.fromkeys(names)))
        if scale is None:
            return value
        if not torch.compiler.is_compiling():
            self._was_read = True
        return self._times(name, value, scale, self._basis_of(names))

    def _times(self, name: str, value: Tensor, scale: Tensor, basis: int | None = None) -> Tensor:
        """The weight or bias times the scale, in the wider dtype of the two, and rounded once."""
        axis = self.weight_axis if name == "weight" else 0
        if basis is not None:
            return scaled_in_basis(value, scale, basis, axis)
        shape = [1] * value.ndim
        shape[axis] = -1
        return (value * scale.view(shape).to(value.device)).to(value.dtype)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the layer beneath, such as `eps` or `kernel_size`.

        Methods and properties that a class outside of torch defines are called with this layer as `self`, and so read
        the scaled weight. Names with a leading underscore are not looked up, since libraries mark modules by them.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            # A layer being copied has no modules yet. An error within `weight` must not return the base layer's weight.
            base = self.__dict__.get("_modules", {}).get("base_layer")
            if base is None or name.startswith("_") or isinstance(getattr(type(self), name, None), property):
                raise
        owner = next((cls for cls in type(base).__mro__ if name in vars(cls)), None)
        attribute = None if owner is None or owner.__module__.startswith("torch.nn.") else vars(owner)[name]
        return attribute.__get__(self) if isinstance(attribute, (types.FunctionType, property)) else getattr(base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute on the layer beneath if only that has it, and otherwise here."""
        base = self.__dict__.get("_modules", {}).get("base_layer")
        own = name.startswith("_") or base is None or hasattr(type(self), name) or name in self.__dict__
        if own or name in self._modules or name in self._parameters or not hasattr(base, name):
            super().__setattr__(name, value)
        else:
            setattr(base, name, value)

    def update_layer(
        self, adapter_name: str, config: PropulsionConfig, name: str = "", *, lean: bool | None = None
    ) -> None:
        """Add an adapter. `name` is the module's name, and `lean` applies if the configuration's is None."""
        weight = self.base_weight
        degree = config.degree_pattern.get(get_pattern_key(list(config.degree_pattern), name), config.degree)
        z = initial_vectors(
            config.vectors,
            self.out_features,
            degree=degree,
            pooling=config.pooling,
            value=config.init_value,
            noise=config.init_noise if config.init_weights else max(config.init_noise, _NOISE),
            dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32,
        )
        self.propulsion_z[adapter_name] = nn.Parameter(z.to(weight.device))
        self.degree[adapter_name] = degree
        self.pooling[adapter_name] = config.pooling
        self.basis[adapter_name] = config.basis_seed if config.basis == "rotated" else None
        self._lean = bool(lean if config.lean is None else config.lean)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move z to the layer's device. peft's own method would also cast it to the layer's dtype."""
        z: Any = self.propulsion_z.get(adapter_name)
        if z is not None and "meta" not in (z.device.type, self.base_weight.device.type):
            dtype = torch.float64 if self.base_weight.dtype == torch.float64 else z.dtype
            z.data = z.data.to(self.base_weight.device if device is None else device, dtype)

    def scale(self, adapter_names: Sequence[str]) -> Float[Tensor, "d_out"] | None:
        """The product of the scales of the named adapters that the layer has; None if it has none of them."""
        scale = None
        for name in adapter_names:
            if name in self.propulsion_z:
                factor = scale_of(self.propulsion_z[name], self.degree[name], self.pooling[name])
                scale = factor if scale is None else scale * factor
        return scale

    def _basis_of(self, adapter_names: Sequence[str]) -> int | None:
        """The seed of the rotated basis in which the named adapters scale; None for coordinates.

        Raises:
            ValueError: they scale in different bases, so that their order would matter.
        """
        seeds = {self.basis[name] for name in adapter_names if name in self.propulsion_z}
        if len(seeds) > 1:
            raise ValueError(
                f"expected adapters of one basis and basis_seed, got {sorted(set(adapter_names))} of different ones: "
                "activate or merge one at a time"
            )
        return seeds.pop() if seeds else None

    def _scaled(self, output: Tensor, scale: Tensor, basis: int | None) -> Tensor:
        """The output of the layer beneath after the scale."""
        if basis is not None:
            return scaled_in_basis(output, scale, basis)
        lean = self._may_be_lean(scale)
        along_output = scale.reshape(-1, *(1,) * self.kernel_axes)
        return multiply(output, along_output, lean=lean, overwrite=lean and self._owns(output))

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """Return z^k * v, or the output of the layer beneath if the adapters are disabled or merged.

        Args:
            args: arguments of the layer beneath.
            adapter_names: one adapter for each example of a batch that mixes them; "__base__" stands for none.
            kwargs: keyword arguments of the layer beneath.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        if adapter_names is not None and self.merged:
            raise ValueError("expected an unmerged model for a batch that mixes adapters: call unmerge_adapter() first")
        output = self.base_layer(*args, **kwargs)
        if self.disable_adapters or self.merged:
            return output
        if adapter_names is not None:
            return self._mixed(output, adapter_names)
        scale = self.scale(self.active_adapters)
        return output if scale is None else self._scaled(output, scale, self._basis_of(self.active_adapters))

    def _mixed(self, output: Tensor, adapter_names: list[str]) -> Tensor:
        """Scale each example by its own adapter. An output with one row for all examples is repeated for each."""
        if len(output) not in (1, len(adapter_names)) or output.ndim < 2 + self.kernel_axes:
            raise ValueError(f"expected one adapter name for each of {len(output)} examples, got {len(adapter_names)}")
        if any(self.basis.get(name) is not None for name in adapter_names):
            raise ValueError(
                "expected adapters that scale coordinates for a batch that mixes adapters, got one with "
                "basis='rotated': run each adapter's examples by themselves"
            )
        by_name = {name: self.scale([name]) for name in dict.fromkeys(adapter_names)}
        some = next((scale for scale in by_name.values() if scale is not None), None)
        if some is None:
            return output
        scales = torch.stack([torch.ones_like(some) if scale is None else scale for scale in by_name.values()])
        rows = torch.tensor([list(by_name).index(name) for name in adapter_names], device=output.device)
        between, after = (1,) * (output.ndim - 2 - self.kernel_axes), (1,) * self.kernel_axes
        return multiply(output, scales[rows].reshape(len(rows), *between, -1, *after), lean=False)

    def _may_be_lean(self, scale: Tensor) -> bool:
        """Whether the scaled output alone may be kept for the backward pass (`propulsion.scaled_output`)."""
        if not (self._lean and self.training and scale.requires_grad and torch.is_grad_enabled()):
            return False
        # A compiler decides what to keep, and under a transform of torch.func values cannot be read.
        if torch.compiler.is_compiling() or transforms_active():
            return False
        if not _waits(scale):
            return bool((scale.detach().abs() >= SMALLEST).all())
        if self._far[0] != self._state():
            self._look()
        return self._far[1]

    def __getstate__(self) -> dict[str, Any]:
        """Copy the layer without references to the model's other layers."""
        return {**self.__dict__, "_together": [], "_far": ((), False), "_of_examples": {}}

    def _state(self) -> tuple:
        """A value that changes whenever any z, or the set of active adapters, does."""
        return tuple((name, z._version, id(z)) for name, z in self.propulsion_z.items()), tuple(self.active_adapters)

    @torch.no_grad()
    def _look(self) -> None:
        """Compute whether the scale is far from zero, for all layers of the model at once.

        Reading values waits for the accelerator, and is therefore done once for each step and not for each layer. A
        change through `z.data` is not noticed; if it sets z = 0, the gradient is then not a number.
        """
        scales = {layer: layer.scale(layer.active_adapters) for layer in self._together or [self] if layer._lean}
        smallest = [scale.abs().amin().to(self.base_weight.device) for scale in scales.values() if scale is not None]
        values = iter(torch.stack(smallest).tolist())
        for layer, scale in scales.items():
            layer._far = (layer._state(), scale is not None and next(values) >= SMALLEST)

    def _owns(self, output: Tensor) -> bool:
        """Whether no other code holds this output: the layer beneath has torch's own forward and no hooks."""
        base = self.get_base_layer()
        watched = base._forward_hooks or "forward" in vars(base) or nn.modules.module._global_forward_hooks
        return _is_torchs_own(base) and not watched and output.is_contiguous() and output.is_floating_point()

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold z^k into the weight and bias: W' = diag(z^k) W, b' = z^k * b.

        Args:
            safe_merge: Refuse a merged weight that is not finite.
            adapter_names: Adapters to merge; the active ones if None.

        Raises:
            ValueError: the weight is quantised without a scale for each output, an embedding renormalises its rows, the
                layer's class has a forward that is not linear in its weight, or `safe_merge` found a non-finite value.
                The layer is then unchanged.
        """
        adapter_names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.propulsion_z]
        scale, whole = self.scale(adapter_names), self.scale([*self.merged_adapters, *adapter_names])
        if scale is None or whole is None:
            return
        basis = self._basis_of([*self.merged_adapters, *adapter_names])
        base = self.get_base_layer()
        self._check_mergeable(base, scale, basis)
        quantised.gather(base)
        # A further merge starts from the unmerged weight, so that the weight is rounded once.
        unmerged = self._unmerged or {
            name: parameter for name in ("weight", "bias") if (parameter := getattr(base, name, None)) is not None
        }
        merged = {
            name: quantised.scaled(p, whole)
            if quantised.is_quantised(p)
            else nn.Parameter(self._times(name, p, whole, basis), requires_grad=p.requires_grad)
            for name, p in unmerged.items()
        }
        if safe_merge and not all(quantised.is_finite(value) for value in merged.values()):
            raise ValueError(
                # These are the words of peft's message, which its users search for.
                f"NaNs detected in the merged weights. The adapter {adapter_names[-1]} seems to be broken: z or the "
                f"weight is, or z^k overflows {unmerged['weight'].dtype}. Nothing was merged"
            )
        self._check_follows(base, merged, scale, basis)
        self._put(base, merged)
        self._unmerged = unmerged
        self.merged_adapters = [*self.merged_adapters, *adapter_names]

    def unmerge(self) -> None:
        """Put the weight and bias back that `merge` replaced, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base = self.get_base_layer()
        for name, parameter in self._unmerged.items():
            merged = getattr(base, name)
            # The kept parameters are not part of the model, and have not moved with it.
            if not quantised.is_quantised(parameter):
                parameter.data = parameter.data.to(merged.device, merged.dtype)
            elif parameter.device != merged.device:
                parameter = parameter.to(merged.device)
            setattr(base, name, parameter)
        self._unmerged = {}
        self.merged_adapters = []

    def _put(self, base: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            setattr(base, name, parameter)

    def _check_mergeable(self, base: nn.Module, scale: Tensor, basis: int | None) -> None:
        weight = self.base_weight
        rotated = "a rotated basis mixes its rows" if basis is not None else None
        if quantised.is_quantised(weight) and (
            reason := rotated or quantised.obstacle(weight, scale, self.weight_axis)
        ):
            raise ValueError(
                f"expected a weight to merge into, got a quantised {type(base).__name__} of dtype {weight.dtype}: "
                f"{reason}. Dequantise the model, or keep the adapter unmerged"
            )
        if base._parameters.get("weight") is None:
            raise ValueError(
                f"expected a {type(base).__name__} with a weight of its own to merge into, got one computed from other "
                "parameters (weight_norm and the like): remove that, or keep the adapter unmerged"
            )
        if getattr(base, "max_norm", None) is not None:
            raise ValueError(
                "expected an Embedding without max_norm to merge into, as it would renormalise the merged rows: keep "
                "the adapter unmerged"
            )

    def probe(self) -> Tensor | None:
        """A test input for a layer whose class has a forward of its own; None if no input is known."""
        return None

    def _check_follows(
        self, base: nn.Module, merged: dict[str, nn.Parameter], scale: Tensor, basis: int | None
    ) -> None:
        """Raise if a layer with a forward of its own does not give the scaled output with the merged weight."""
        x = None if _is_torchs_own(base) or quantised.is_quantised(self.base_weight) else self.probe()
        if x is None:
            return
        current, training = {name: getattr(base, name) for name in merged}, base.training
        try:
            expected = base.eval()(x)
            expected = expected * scale.to(x.device) if basis is None else self._scaled(expected, scale, basis)
            self._put(base, merged)
            error = (base(x) - expected).abs().max()
        except (TypeError, IndexError, RuntimeError):
            return  # Its forward takes other arguments.
        finally:
            self._put(base, current)
            base.train(training)
        precision = torch.finfo(self.base_weight.dtype).eps * 64
        if bool(error > precision * (expected.abs().max() + 1)):
            raise ValueError(
                f"expected a layer that multiplies by its weight to merge into; {type(base).__name__} does more in its "
                "forward: keep the adapter unmerged"
            )

    def __repr__(self) -> str:
        return "propulsion." + super().__repr__()


def adapted_layers(model: nn.Module) -> list[PropulsionLayer]:
    """The layers of a model that have Propulsion."""
    return [module for module in model.modules() if isinstance(module, PropulsionLayer)]


def _waits(scale: Tensor) -> bool:
    """Whether reading a scale waits for an accelerator."""
    return scale.device.type != "cpu"


def _is_torchs_own(base: nn.Module) -> bool:
    """Whether a layer has torch's own forward, which multiplies by its weight and returns a new tensor."""
    return type(base).__module__.startswith("torch.nn.") or type(base) is Conv1D
