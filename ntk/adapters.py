"""Kernels of parameter-efficient methods at their initialisation, from the stream of the full kernel.

At its initialisation an adapter leaves the network's function as it is, so the tangent features of its parameters are
made of what a pass of the bare network shows at each layer: a layer's inputs x_t, its outputs y_t (bias included) and
the gradients g_t there, summed over tokens t. One forward and c backward passes serve every method at once.

A method is one class: either it weighs parameters of the network itself (full fine-tuning, BitFit, norms), or it says,
for one layer, what the features of its own parameters are. r is a layer's width, s that of its input.
"""

import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ntk.features import Dense, Feature, Lookup, Outer

Modules = str | Sequence[str] | Callable[[str], bool] | None
"""Which layers, by a regular expression of the whole name, names or their last parts, or a predicate; None for all."""

# Elements of the inputs that LoHa makes at a time: they stay in the caches.
_INPUTS = 1 << 19

Found = Iterator[tuple[str, torch.Size, Feature]]  # name of the adapter's parameter, its shape, its feature


@dataclass(frozen=True)
class Layer:
    """One use of a linear layer or an embedding by n examples.

    Attributes:
        name: of the module.
        weight: ``(r, s)``; of an embedding its table, ``(rows, r)``.
        bias: ``(r,)``, if there is one.
        x: ``(N, s)`` inputs; None for an embedding.
        y: ``(N, r)`` outputs.
        feature: of the weight; it holds the gradients at the outputs.
        weighed: a method's :meth:`Method.share` of the weight was asked for, knowing the layer.
        at_inputs: ``(c, N, s)``, the gradients at the inputs by way of this layer, if they are not just g W.
        read: where the model reads the layer's weight W and bias b and does not call it, ``(n, c, r)``,
            sum_k (df/dW_jk) W_jk + (df/db_j) b_j, which is what g_tj y_tj sums to over the tokens of calls.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    x: Tensor | None
    y: Tensor
    feature: Outer | Lookup
    weighed: bool = True
    at_inputs: Tensor | None = None
    read: Tensor | None = None

    @property
    def g(self) -> Float[Tensor, "c N r"]:
        """The gradients g_t at the outputs."""
        return self.feature.g

    def over_tokens(self, values: Float[Tensor, "c N d"]) -> Dense:
        """The sum over each example's tokens, as a feature."""
        return Dense(self.feature.tokens.sums(values).transpose(0, 1))

    @cached_property
    def gy(self) -> Dense:
        """sum_t g_tj y_tj."""
        return self.over_tokens(self.g * self.y)

    @cached_property
    def gx(self) -> Dense:
        """The sum over tokens of inputs times the gradients at them."""
        assert self.x is not None
        back = self.g @ self.weight.to(self.g.dtype) if self.at_inputs is None else self.at_inputs
        return self.over_tokens(back * self.x)


class Method:
    """A parameter-efficient method at its initialisation."""

    def share(self, name: str, parameter: Tensor, module: nn.Module, layer: str | None) -> float:
        """How much a parameter of the network counts: its kernel is multiplied by this. 0 where it is frozen.

        Args:
            name: of the parameter.
            parameter: itself.
            module: whose parameter it is.
            layer: that module's name, if the parameter is its matrix, only its, and adapters may stand beside it.
        """
        return 0.0

    def adapts(self, module: str) -> bool:
        """Whether a layer, by its module's name, carries parameters of the method's own."""
        return False

    def features(self, layer: Layer) -> Found:
        """The features of the method's own parameters at a layer that carries them."""
        return iter(())

    @property
    def in_reads(self) -> bool:
        """Whether these also act where the model reads a layer's weight and does not call it; peft's act on calls."""
        return False


@dataclass(frozen=True)
class Full(Method):
    """Full fine-tuning."""

    def share(self, name: str, parameter: Tensor, module: nn.Module, layer: str | None) -> float:
        """Everything."""
        return 1.0


@dataclass(frozen=True)
class BitFit(Method):
    """All biases, those of norms included (Ben Zaken, Goldberg and Ravfogel 2022)."""

    def share(self, name: str, parameter: Tensor, module: nn.Module, layer: str | None) -> float:
        """Parameters whose name ends in bias."""
        return float(name.endswith("bias"))


@dataclass(frozen=True)
class NormTuning(Method):
    """Scales and shifts of all normalisation layers, known by their class's name (Zhao et al. 2024)."""

    def share(self, name: str, parameter: Tensor, module: nn.Module, layer: str | None) -> float:
        """Parameters of norms."""
        return float("norm" in type(module).__name__.lower())


@dataclass(frozen=True)
class Propulsion(Method):
    """A vector z on the outputs of layers, acting as z**degree, at z = 1 (Kowsher et al. 2024).

        d f / d z_j = degree * sum_t g_tj y_tj

    A model that reads a layer's weight and bias, and does not call it, finds z**degree in them.

    Attributes:
        degree: the exponent k; the kernel grows as k squared.
        modules: layers and embeddings that carry a vector.
    """

    degree: float = 1.0
    modules: Modules = None

    def adapts(self, module: str) -> bool:
        """The chosen layers."""
        return chosen(self.modules, module)

    def features(self, layer: Layer) -> Found:
        """One vector of length r."""
        value = layer.gy.value if layer.read is None else layer.gy.value + layer.read
        yield "z", layer.y.shape[-1:], Dense(self.degree * value)

    @property
    def in_reads(self) -> bool:
        """It scales the weight that is read."""
        return True


@dataclass(frozen=True)
class IA3(Method):
    """Vectors on the outputs of layers, or on the inputs of feed-forward ones, at 1 (Liu et al. 2022).

    Attributes:
        modules: layers whose outputs are scaled.
        feedforward: layers whose inputs are scaled instead.
    """

    modules: Modules
    feedforward: Modules = ()

    def adapts(self, module: str) -> bool:
        """The chosen layers."""
        return chosen(self.modules, module) or chosen(self.feedforward, module)

    def features(self, layer: Layer) -> Found:
        """One vector of length s or r."""
        if layer.x is None:
            return
        if chosen(self.feedforward, layer.name):
            yield "l", layer.x.shape[-1:], layer.gx
        else:
            yield "l", layer.y.shape[-1:], layer.gy


@dataclass(frozen=True)
class LoRA(Method):
    """A product B A beside each weight, at B = 0 (Hu et al. 2022): d f / d B = (alpha / rank) sum_t g_t (A x_t)^T.

    Attributes:
        rank: of the product.
        alpha: the product is multiplied by alpha / rank; by default alpha = rank.
        modules: linear layers that carry one.
        a: matrices A ``(rank, s)`` by module name; "random" for peft's own initialisation, drawn from ``seed``;
            "expected" for the mean of the kernel over those draws.
        seed: of the random matrices, which do not depend on the other layers.
    """

    rank: int = 8
    alpha: float | None = None
    modules: Modules = None
    a: Mapping[str, Tensor] | str = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"the rank of LoRA must be at least 1; got {self.rank}")
        if isinstance(self.a, str) and self.a not in ("random", "expected"):
            raise ValueError(f"a must be 'random', 'expected' or matrices by module name; got {self.a!r}")

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def share(self, name: str, parameter: Tensor, module: nn.Module, layer: str | None) -> float:
        """In the mean over A, whose entries have variance 1 / (3 s), a multiple of the weight's own kernel."""
        if self.a != "expected" or layer is None or not chosen(self.modules, layer):
            return 0.0
        return self._of_weight(parameter.shape[0 if isinstance(module, Conv1D) else 1])

    def _of_weight(self, width: int) -> float:
        return self.scale**2 * self.rank / (3 * width)

    def adapts(self, module: str) -> bool:
        """The chosen layers."""
        return chosen(self.modules, module)

    def features(self, layer: Layer) -> Found:
        """The matrix B, ``(r, rank)``; in the mean over A a multiple of the weight, unless its own kernel says it."""
        if layer.x is None:
            return
        if self.a == "expected":
            if not layer.weighed:
                assert isinstance(layer.feature, Outer)
                x = self._of_weight(layer.x.shape[-1]) ** 0.5 * layer.x
                yield "W", torch.Size((layer.y.shape[-1], x.shape[-1])), layer.feature.beside(x)
            return
        a = self._matrix(layer).to(layer.x)
        shape = torch.Size((layer.y.shape[-1], len(a)))
        assert isinstance(layer.feature, Outer)
        yield "B", shape, layer.feature.beside(self.scale * (layer.x @ a.T))

    def _matrix(self, layer: Layer) -> Float[Tensor, "rank s"]:
        if isinstance(self.a, str):
            return kaiming_uniform((self.rank, layer.weight.shape[1]), f"{self.seed}.{layer.name}")
        if layer.name not in self.a:
            raise ValueError(f"no matrix A is given for {layer.name}; give one, or leave the layer out of modules")
        return self.a[layer.name]


@dataclass(frozen=True)
class DoRA(LoRA):
    """LoRA beside the direction of each weight, and its rows' lengths m (Liu et al. 2024).

    At B = 0, d f / d B is LoRA's, since the norm is held constant in the gradient, and
    d f / d m_j = sum_t g_tj (W x_t)_j / |W_j|.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.a == "expected":
            raise ValueError("DoRA has no mean over A here: its lengths do not depend on A; use LoRA for that part")

    def features(self, layer: Layer) -> Found:
        """LoRA's matrix and the lengths."""
        if layer.x is None:
            return
        yield from super().features(layer)
        lengths = layer.weight.norm(dim=1)
        linear = layer.gy.value
        if layer.bias is not None:
            linear = linear - layer.over_tokens(layer.g).value * layer.bias
        yield "m", lengths.shape, Dense(linear / lengths)


@dataclass(frozen=True)
class VeRA(Method):
    """Frozen random matrices A and B shared by all layers, vectors b = 0 and d trained (Kopiczko et al. 2024).

        d f / d b_j = sum_t g_tj (B (d * A x_t))_j       (d f / d d = 0 at b = 0)

    Attributes:
        a: ``(rank, s)``, at least as wide as the widest input.
        b: ``(r, rank)``, at least as long as the longest output.
        initial: value of d.
        modules: linear layers that carry vectors.
    """

    a: Tensor
    b: Tensor
    initial: float = 0.1
    modules: Modules = None

    def adapts(self, module: str) -> bool:
        """The chosen layers."""
        return chosen(self.modules, module)

    def features(self, layer: Layer) -> Found:
        """The vector b, of length r."""
        if layer.x is None:
            return
        r, s = layer.weight.shape
        if self.a.shape[1] < s or len(self.b) < r:
            raise ValueError(f"{layer.name} is {r} x {s}: VeRA's matrices {tuple(self.b.shape)} and "
                             f"{tuple(self.a.shape)} are too small")  # fmt: skip
        inner = self.initial * (layer.x @ self.a[:, :s].to(layer.x).T) @ self.b[:r].to(layer.x).T
        yield "b", torch.Size((r,)), layer.over_tokens(layer.g * inner)


@dataclass(frozen=True)
class LoHa(Method):
    """The elementwise product of two low-rank products beside each weight, at w2_b = 0 (Hyeon-Woo et al. 2022).

        d f / d w2_b = (alpha / rank) w2_a^T (sum_t g_t x_t^T * (w1_a w1_b))

    Attributes:
        rank: of each product.
        alpha: the whole is multiplied by alpha / rank; by default alpha = rank.
        modules: linear layers that carry one.
        factors: (w1_a ``(r, rank)``, w1_b ``(rank, s)``, w2_a ``(r, rank)``) by module name; if None, peft's
            initialisation from ``seed``.
        seed: of the random factors.
    """

    rank: int = 8
    alpha: float | None = None
    modules: Modules = None
    factors: Mapping[str, tuple[Tensor, Tensor, Tensor]] | None = None
    seed: int = 0

    def adapts(self, module: str) -> bool:
        """The chosen layers."""
        return chosen(self.modules, module)

    def features(self, layer: Layer) -> Found:
        """The matrix w2_b, ``(rank, s)``."""
        if layer.x is None:
            return
        r, s = layer.weight.shape
        key = f"{self.seed}.{layer.name}"
        factors = (
            (kaiming_uniform((r, self.rank), key + ".1a"), kaiming_uniform((self.rank, s), key + ".1b"),
             kaiming_uniform((r, self.rank), key + ".2a"))
            if self.factors is None
            else self.factors[layer.name]
        )  # fmt: skip
        w1_a, w1_b, w2_a = (factor.to(layer.g) for factor in factors)
        scale = 1.0 if self.alpha is None else self.alpha / self.rank
        # Each token's x * w1_b[p], and the product with every column p of w1_a in its gradient, contracted over both;
        # a few examples at a time, since these inputs are rank times as large as the layer's.
        tokens = layer.feature.tokens
        x = tokens.padded(layer.x)  # (n, t, s)
        columns = (w1_a[:, :, None] * w2_a[:, None, :]).flatten(1)  # (r, p q)
        inner = tokens.padded(layer.g @ columns).unflatten(-1, (-1, self.rank))  # (c, n, t, p, q)
        inner = inner.flatten(2, 3).permute(1, 0, 3, 2).flatten(1, 2)  # (n, c q, t p)
        step = max(1, _INPUTS // (x[0].numel() * self.rank))
        value = torch.cat([
            left @ (right[:, :, None] * w1_b).flatten(1, 2) for left, right in zip(inner.split(step), x.split(step))
        ])  # (n, c q, s)  # fmt: skip
        value = value.unflatten(1, (-1, self.rank))
        yield "w2_b", torch.Size((self.rank, s)), Dense(scale * value)


@dataclass(frozen=True)
class RandomSubset(Method):
    """Weights chosen at random, trained directly, the others frozen (as SHiRA does; Bhardwaj et al. 2024).

    Attributes:
        count: weights of each layer; all of a layer that has fewer.
        modules: linear layers they are drawn from.
        seed: of the choice, which does not depend on the other layers.
    """

    count: int
    modules: Modules = None
    seed: int = 0

    def adapts(self, module: str) -> bool:
        """The chosen layers."""
        return chosen(self.modules, module)

    def features(self, layer: Layer) -> Found:
        """The chosen entries of the weight's feature."""
        if layer.x is None:
            return
        if layer.read is not None or layer.at_inputs is not None:
            raise NotImplementedError(
                f"{layer.name} does more than multiply by its weight, or the model reads that weight itself, so that "
                "its single entries have no kernel here: leave it out of modules, or take "
                "ntk.random_subset_ntk(model, ...) of all weights"
            )
        places = subset(layer.weight.numel(), self.count, f"{self.seed}.{layer.name}").to(layer.g.device)
        rows, columns = places // layer.weight.shape[1], places % layer.weight.shape[1]
        g = layer.g.gather(-1, rows.expand(*layer.g.shape[:2], -1))
        x = layer.x.gather(-1, columns.expand(len(layer.x), -1))
        yield "W", torch.Size((len(places),)), layer.over_tokens(g * x)


def chosen(modules: Modules, name: str) -> bool:
    """Whether a choice of layers holds a module, as peft reads ``target_modules``."""
    if modules is None:
        return True
    if callable(modules):
        return modules(name)
    if isinstance(modules, str):
        return re.fullmatch(modules, name) is not None
    return any(name == part or name.endswith(f".{part}") for part in modules)


@lru_cache(maxsize=1024)
def kaiming_uniform(shape: tuple[int, int], key: str) -> Tensor:
    """Entries uniform in +-1 / sqrt(columns), as ``nn.Linear`` and peft draw them, from a key of their own."""
    generator = torch.Generator().manual_seed(_seed(key))
    return torch.empty(shape).uniform_(-1, 1, generator=generator) / math.sqrt(shape[1])


@lru_cache(maxsize=1024)
def subset(total: int, count: int, key: str) -> Tensor:
    """``count`` of ``total`` numbers, drawn without replacement from a key of their own, in order."""
    drawn = np.random.default_rng(_seed(key)).choice(total, min(count, total), replace=False)
    return torch.from_numpy(np.sort(drawn))


def _seed(key: str) -> int:
    return zlib.crc32(key.encode())


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that take adapters, by the names of their modules.

    Those are the linear layers and embeddings of the model's body; what a Hugging Face model has beside its body is the
    head, and none. Modules that share a weight are layers of their own.
    """
    body = getattr(model, getattr(model, "base_model_prefix", "") or "", model)
    inside = {id(module) for module in body.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if id(module) in inside and isinstance(module, (nn.Linear, Conv1D, nn.Embedding))
    }


def layer_of(name: str, module: nn.Module, feature: Outer | Lookup, output: Tensor | None, *, weighed: bool) -> Layer:
    """One layer as the methods see it, from a captured use of its weight that is all that its call does.

    Args:
        name: of the module.
        module: linear layer or embedding.
        feature: of its weight.
        output: of the operation, ``(N, r)``; computed anew if None.
        weighed: as in :class:`Layer`.

    Raises:
        NotImplementedError: the output of an embedding is gone, overwritten by what came after it.
    """
    weight, bias = matrix_of(module)
    x = feature.x.to(feature.g.dtype) if isinstance(feature, Outer) else None
    if output is None:
        if x is None:
            raise NotImplementedError(f"the model overwrites the output of {name}")
        output = torch.nn.functional.linear(x.to(weight.dtype), weight, bias)
    return Layer(name, weight, bias, x, output.to(feature.g.dtype), feature, weighed)


def matrix_of(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight, ``(r, s)`` of a linear layer and ``(rows, r)`` of an embedding, and bias; detached."""
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    weight = weight.detach().T if isinstance(module, Conv1D) else weight.detach()
    return weight, None if bias is None else bias.detach()
