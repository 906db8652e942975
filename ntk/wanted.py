"""Which kernels are wanted, and which captured features go into each."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ntk.adapters import Method, layer_of, layers_of
from ntk.capture import Captured
from ntk.features import Feature, Lookup


@dataclass(frozen=True)
class Piece:
    """The feature of one use of one trained parameter.

    Attributes:
        slot: tells a parameter of the network ("") from those of adapters at its layer.
        shape: of the trained parameter.
        shares: kernel -> the multiple of this parameter's kernel that is in it.
        feature: the feature.
    """

    slot: str
    shape: torch.Size
    shares: Mapping[str, float]
    feature: Feature


@dataclass(frozen=True)
class Wanted:
    """A set of kernels.

    Attributes:
        shares: parameter of the network -> kernel -> the multiple of the parameter's kernel that is in it.
        methods: kernel -> the method whose own parameters are in it.
        layers: (parameter name, whether an embedding reads it) -> (module name, module) of layers that take adapters.
    """

    shares: Mapping[str, Mapping[str, float]]
    methods: Mapping[str, Method] = field(default_factory=dict)
    layers: Mapping[tuple[str, bool], tuple[str, nn.Module]] = field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        """The names of the kernels."""
        own = [key for shares in self.shares.values() for key in shares]
        return list(dict.fromkeys([*own, *self.methods]))

    def pieces(self, found: Captured, shape: torch.Size) -> Iterator[Piece]:
        """What one captured use contributes."""
        feature = found.feature
        if shares := self.shares.get(found.name):
            yield Piece("", shape, shares, feature)
        place = self.layers.get((found.name, isinstance(found.feature, Lookup)))
        methods = {key: m for key, m in self.methods.items() if place is not None and m.adapts(place[0])}
        if place is None or not methods:
            return
        if found.derived:
            raise NotImplementedError(f"{place[0]} changes its weight before it uses it, and takes no adapter here")
        layer = layer_of(*place, feature, found.output)
        for key, method in methods.items():
            for name, size, own in method.features(layer):
                yield Piece(f"{key}.{layer.name}.{name}", size, {key: 1.0}, own)


def parameter_kernels(parameters: Mapping[str, Tensor], *, summed: bool) -> Wanted:
    """The kernel of each parameter under its name, or their sum under the name ""."""
    return Wanted({name: {"" if summed else name: 1.0} for name in parameters})


def method_kernels(model: nn.Module, methods: Mapping[str, Method]) -> Wanted:
    """The kernel of each method under its name.

    Raises:
        ValueError: a method trains nothing in this model.
    """
    owners = {id(p): m for m in model.modules() for p in m.parameters(recurse=False)}
    adaptable = layers_of(model)
    shares = {}
    for name, p in model.named_parameters():
        layer = adaptable.get((name, False), (None,))[0]
        found = {key: method.share(name, p, owners[id(p)], layer) for key, method in methods.items()}
        shares[name] = {key: share for key, share in found.items() if share}
    layers = {
        place: (name, module)
        for place, (name, module) in adaptable.items()
        if any(method.adapts(name) for method in methods.values())
    }
    for key, method in methods.items():
        if not any(key in found for found in shares.values()) and not any(method.adapts(n) for n, _ in layers.values()):
            raise ValueError(f"method {key!r} ({method}) trains nothing in this model: see its choice of modules")
    return Wanted({name: found for name, found in shares.items() if found}, methods, layers)
