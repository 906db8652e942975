"""Methods that train parameters of the network itself: all, biases, norms, or a random subset, with or without head."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from ntk.adapters.method import Found, Layer, LayerMethod, Method, Modules, seed_of
from ntk.checks import check_count


@dataclass(frozen=True)
class Full(Method):
    """Full fine-tuning: all parameters are trained."""

    def share(self, name: str, parameter: Tensor, module: nn.Module, layer: str | None) -> float:
        """1 for every parameter."""
        return 1.0


@dataclass(frozen=True)
class BitFit(Method):
    """Training of all biases, those of norms included (Ben Zaken, Goldberg and Ravfogel 2022)."""

    def share(self, name: str, parameter: Tensor, module: nn.Module, layer: str | None) -> float:
        """1 for parameters whose name ends in "bias"."""
        return float(name.endswith("bias"))


@dataclass(frozen=True)
class NormTuning(Method):
    """Training of the scales and shifts of normalisation layers (Zhao et al. 2024).

    They are the modules whose class has "norm" in its name.
    """

    def share(self, name: str, parameter: Tensor, module: nn.Module, layer: str | None) -> float:
        """1 for parameters of normalisation layers."""
        return float("norm" in type(module).__name__.lower())


@dataclass(frozen=True)
class Backbone(Method):
    """A method that trains no parameter of the head; the parameters that it adds to layers stay.

    Attributes:
        method: the method.
        prefix: the beginning of the names of the backbone's parameters, as in f"{model.base_model_prefix}."; "" where
            there is no head.
    """

    method: Method
    prefix: str

    def share(self, name: str, parameter: Tensor, module: nn.Module, layer: str | None) -> float:
        """The share under `method` for a parameter of the backbone, 0 for one of the head."""
        return self.method.share(name, parameter, module, layer) if name.startswith(self.prefix) else 0.0

    def adapts(self, module: str) -> bool:
        """Whether `method` adapts the module."""
        return self.method.adapts(module)

    def features(self, layer: Layer) -> Found:
        """The features of `method`."""
        return self.method.features(layer)

    @property
    def in_reads(self) -> bool:
        """The value of `method`."""
        return self.method.in_reads


@dataclass(frozen=True)
class RandomSubset(LayerMethod):
    """Weights chosen at random and trained directly, with the others frozen (as in SHiRA; Bhardwaj et al. 2024).

    Attributes:
        count: number of weights of each layer; all weights of a layer that has fewer.
        modules: the linear layers that they are drawn from.
        seed: of the choice, which does not depend on the other layers.
    """

    count: int
    modules: Modules = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_count(self.count, "the count of RandomSubset")

    def features(self, layer: Layer) -> Found:
        """The feature of the chosen entries of the weight."""
        if layer.x is None:
            return
        if layer.read is not None or layer.at_inputs is not None:
            raise NotImplementedError(
                f"{layer.name} does more than multiply by its weight, or the model uses that weight itself; "
                "the kernel of single entries is not known there: leave it out of modules, or take "
                "ntk.random_subset_ntk(model, ...) of all weights"
            )
        places = subset(layer.weight.numel(), self.count, f"{self.seed}.{layer.name}").to(layer.g.device)
        rows, columns = places // layer.weight.shape[1], places % layer.weight.shape[1]
        g = layer.g.gather(-1, rows.expand(*layer.g.shape[:2], -1))
        x = layer.x.gather(-1, columns.expand(len(layer.x), -1))
        yield "W", torch.Size((len(places),)), layer.over_tokens(g * x)


@lru_cache(maxsize=1024)
def subset(total: int, count: int, key: str) -> Tensor:
    """``count`` distinct random numbers below ``total``, ascending, seeded by ``key``."""
    drawn = np.random.default_rng(seed_of(key)).choice(total, min(count, total), replace=False)
    return torch.from_numpy(np.sort(drawn))
