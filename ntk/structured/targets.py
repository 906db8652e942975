"""Which kernels are wanted, and which captured features go into each."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from ntk.adapters import Method, layer_of, layers_of
from ntk.features import Dense, Feature
from ntk.structured.capture import Captured


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
        layers: name of the module -> (module, parameter that is its weight) of the layers at which methods' own
            parameters are captured.
        others: the same of modules that share such a weight; what they do with it is no affair of those layers.
        lost: layers whose weight turned out to be used otherwise than by their calls, with the reason: what is captured
            for the methods lacks them.
    """

    shares: Mapping[str, Mapping[str, float]]
    methods: Mapping[str, Method] = field(default_factory=dict)
    layers: Mapping[str, tuple[nn.Module, str]] = field(default_factory=dict)
    others: Mapping[str, tuple[nn.Module, str]] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        """The names of the kernels."""
        own = [key for shares in self.shares.values() for key in shares]
        return list(dict.fromkeys([*own, *self.methods]))

    @cached_property
    def weights(self) -> dict[str, list[str]]:
        """Parameter -> the layers whose weight it is."""
        found: dict[str, list[str]] = {}
        for name, (_, weight) in self.layers.items():
            found.setdefault(weight, []).append(name)
        return found

    def pieces(self, found: Captured, shape: torch.Size) -> Iterator[Piece]:
        """What one captured use contributes."""
        if shares := self.shares.get(found.name):
            yield Piece("", shape, shares, found.feature)
        name = self.layer_used(found.name, found.within, found.layer)
        if name is None or name in self.lost:
            return
        module = self.layers[name][0]
        assert not isinstance(found.feature, Dense)
        try:
            layer = layer_of(name, module, found.feature, found.output, weighed=self.weighed(found.name) == name)
        except NotImplementedError as error:
            self.lost[name] = str(error)
            return
        for key, method in self.methods.items():
            if method.adapts(name):
                for slot, size, own in method.features(layer):
                    yield Piece(f"{key}.{name}.{slot}", size, {key: 1.0}, own)

    def weighed(self, parameter: str) -> str | None:
        """The linear layer of which alone a parameter is the weight."""
        users = [
            name for side in (self.layers, self.others) for name, (_, weight) in side.items() if weight == parameter
        ]
        alone = len(users) == 1 and users[0] in self.layers and not isinstance(self.layers[users[0]][0], nn.Embedding)
        return users[0] if alone else None

    def layer_used(self, parameter: str, within: str | None, layer: str | None) -> str | None:
        """Which layer's call a use of a parameter is all of; notes the layers that it shows to be lost."""
        layers = self.weights.get(parameter, [])
        if layer in layers:
            return layer
        if layer is None and within not in self.others:
            for name in [within] if within in layers else layers:
                assert name is not None
                self.lost.setdefault(name, "its weight is not only used by calls that multiply each token by it")
        return None


def parameter_kernels(parameters: Mapping[str, Tensor], *, summed: bool) -> Wanted:
    """The kernel of each parameter under its name, or their sum under the name ""."""
    return Wanted({name: {"" if summed else name: 1.0} for name in parameters})


def method_kernels(model: nn.Module, methods: Mapping[str, Method], lost: Mapping[str, str] | None = None) -> Wanted:
    """The kernel of each method under its name.

    Args:
        model: the bare model.
        methods: by name.
        lost: layers at which nothing is captured for the methods. Those whose weight is no parameter of the model are
            added to them.

    Raises:
        ValueError: a method trains nothing in this model.
    """
    owners = {id(p): m for m in model.modules() for p in m.parameters(recurse=False)}
    adaptable = layers_of(model)
    names = {id(p): name for name, p in model.named_parameters()}
    users: dict[str, dict[str, nn.Module]] = {}  # weight -> modules whose weight it is
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            users.setdefault(names[id(weight)], {})[name] = module
    chosen = {name: m for name, m in adaptable.items() if any(method.adapts(name) for method in methods.values())}
    for key, method in methods.items():
        trains = any(method.share(name, p, owners[id(p)], None) for name, p in model.named_parameters())
        if not trains and not any(method.adapts(name) for name in chosen):
            raise ValueError(f"method {key!r} ({method}) trains nothing in this model: see its choice of modules")
    missing = dict(lost or {})
    layers, others = {}, {}
    for weight, modules in users.items():
        if any(name in chosen for name in modules):
            for name, module in modules.items():
                (layers if name in chosen and name not in missing else others)[name] = (module, weight)
    for name in chosen:
        if name not in layers:
            missing.setdefault(name, "its weight is computed from other parameters")
    wanted = Wanted({}, methods, layers, others, missing)
    shares = {}
    for name, p in model.named_parameters():
        layer = wanted.weighed(name)
        found = {key: method.share(name, p, owners[id(p)], layer) for key, method in methods.items()}
        if found := {key: share for key, share in found.items() if share}:
            shares[name] = found
    return replace(wanted, shares=shares)
