"""Which captured feature enters which kernel, with what weight."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from ntk.adapters import Method, chosen, layer_of, layers_of
from ntk.features import Feature, Lookup, Outer
from ntk.structured.dependence import Captured, Use

WatchedLayers = Mapping[str, tuple[nn.Module, str]]
"""Name of a module -> (the module, the name of its weight among the model's parameters)."""


@dataclass(frozen=True)
class Contribution:
    """The feature of one use of one trained parameter.

    Attributes:
        trained: "" for the model's own parameter, else METHOD.LAYER.NAME.
        shape: of the trained parameter.
        weights: kernel -> the weight with which this parameter's kernel enters it.
        feature: the feature.
    """

    trained: str
    shape: torch.Size
    weights: Mapping[str, float]
    feature: Feature


@dataclass(frozen=True)
class Targets:
    """A set of kernels to compute.

    Attributes:
        weights: parameter of the model -> kernel -> the weight with which the parameter's kernel enters it.
        methods: kernel -> the method whose own parameters enter it.
        layers: the layers at which methods' own parameters are captured.
        others: the other modules that have the same weight; uses within their calls do not concern ``layers``.
        lost: layer -> why its calls are not captured; ``lost`` grows while batches run, and kernels lack these layers.
    """

    weights: Mapping[str, Mapping[str, float]]
    methods: Mapping[str, Method] = field(default_factory=dict)
    layers: WatchedLayers = field(default_factory=dict)
    others: WatchedLayers = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)

    @property
    def kernels(self) -> list[str]:
        """The names of the kernels."""
        return list(dict.fromkeys([*(key for weights in self.weights.values() for key in weights), *self.methods]))

    @property
    def watched(self) -> WatchedLayers:
        """The layers whose calls are watched."""
        return {**self.layers, **self.others}

    @cached_property
    def layers_of_weight(self) -> dict[str, list[str]]:
        """Parameter -> the layers whose weight it is."""
        layers: dict[str, list[str]] = {}
        for name, (_, weight) in self.layers.items():
            layers.setdefault(weight, []).append(name)
        return layers

    def contributions(self, captured: Captured, shape: torch.Size) -> Iterator[Contribution]:
        """What one captured use of a parameter of this shape contributes."""
        if weights := self.weights.get(captured.name):
            yield Contribution("", shape, weights, captured.feature)
        name = self.layer_used(captured.name, captured.use)
        if name is None or name in self.lost:
            return
        assert isinstance(captured.feature, (Outer, Lookup))
        weighed = self.sole_layer(captured.name) == name
        try:
            layer = layer_of(name, self.layers[name][0], captured.feature, captured.output, weighed=weighed)
        except NotImplementedError as error:
            self.lost[name] = str(error)
            return
        for key, method in self.methods.items():
            if method.adapts(name):
                for own, size, feature in method.features(layer):
                    yield Contribution(f"{key}.{name}.{own}", size, {key: 1.0}, feature)

    def sole_layer(self, parameter: str) -> str | None:
        """The linear layer of ``layers`` that has this weight, if no other module has it."""
        users = [name for name, (_, weight) in self.watched.items() if weight == parameter]
        alone = len(users) == 1 and users[0] in self.layers and not isinstance(self.layers[users[0]][0], nn.Embedding)
        return users[0] if alone else None

    def layer_used(self, parameter: str, use: Use) -> str | None:
        """The layer whose call is this use of a parameter and nothing else; notes layers that are shown to be lost."""
        layers = self.layers_of_weight.get(parameter, [])
        if use.layer in layers:
            return use.layer
        if use.layer is None and use.within not in self.others:
            for name in [use.within] if use.within in layers else layers:
                self.lost.setdefault(name, "its weight is not only used by calls that multiply each token by it")
        return None


def parameter_kernels(parameters: Mapping[str, Tensor], *, summed: bool) -> Targets:
    """The kernel of each parameter under its name, or their sum under the name ""."""
    return Targets({name: {"" if summed else name: 1.0} for name in parameters})


def check_named_modules(model: nn.Module, key: str, method: Method) -> None:
    """Make sure that every module that a method names takes an adapter, so that none is left out in silence.

    Raises:
        ValueError: a name is that of a module with parameters that is no linear layer or embedding of the body.
    """
    layers = layers_of(model)
    choices = [getattr(method, field, None) or () for field in ("modules", "feedforward")]
    lists = [choice for choice in choices if not isinstance(choice, str) and not callable(choice)]
    for part in itertools.chain.from_iterable(lists):
        if any(chosen([part], name) for name in layers):
            continue
        for name, module in model.named_modules():
            if chosen([part], name) and next(module.parameters(recurse=False), None) is not None:
                raise ValueError(
                    f"method {key!r} names {name}, a {type(module).__name__}: adapters are on linear layers and "
                    "embeddings of the model's body; leave it out"
                )


def method_kernels(model: nn.Module, methods: Mapping[str, Method], lost: Mapping[str, str] | None = None) -> Targets:
    """The kernel of each method of the bare model under the method's name.

    At the layers in ``lost`` nothing is captured for the methods; in the result, layers whose weight is not a parameter
    of the model are among them.

    Raises:
        ValueError: a method trains nothing in this model, or names a module that takes no adapter here.
    """
    owners = {id(p): m for m in model.modules() for p in m.parameters(recurse=False)}
    names = {id(p): name for name, p in model.named_parameters()}
    users: dict[str, dict[str, nn.Module]] = {}  # weight -> modules whose weight it is
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            users.setdefault(names[id(weight)], {})[name] = module
    adapted = [name for name in layers_of(model) if any(method.adapts(name) for method in methods.values())]
    for key, method in methods.items():
        check_named_modules(model, key, method)
        trains = any(method.share(name, p, owners[id(p)], None) for name, p in model.named_parameters())
        if not trains and not any(method.adapts(name) for name in adapted):
            raise ValueError(f"method {key!r} ({method}) trains nothing in this model: see its choice of modules")
    lost = dict(lost or {})
    layers, others = {}, {}
    for weight, modules in users.items():
        if any(name in adapted for name in modules):
            for name, module in modules.items():
                (layers if name in adapted and name not in lost else others)[name] = (module, weight)
    for name in adapted:
        if name not in layers:
            lost.setdefault(name, "its weight is computed from other parameters")
    targets = Targets({}, methods, layers, others, lost)
    weights = {}
    for name, p in model.named_parameters():
        layer = targets.sole_layer(name)
        shares = {key: method.share(name, p, owners[id(p)], layer) for key, method in methods.items()}
        if shares := {key: share for key, share in shares.items() if share}:
            weights[name] = shares
    return replace(targets, weights=weights)
