"""Methods that add products of low-rank matrices to the weights of linear layers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ntk.adapters.method import Found, Layer, LayerMethod, Modules, chosen, seed_of
from ntk.checks import check_count, check_numbers
from ntk.features import Dense, Outer

# Number of elements of the inputs that LoHa forms at a time, which fit the processor's caches.
_INPUTS = 1 << 19


@dataclass(frozen=True)
class LoRA(LayerMethod):
    """A product B A beside each weight, at B = 0 (Hu et al. 2022): d f / d B = (alpha / rank) sum_t g_t (A x_t)^T.

    Attributes:
        rank: of the product.
        alpha: the product is multiplied by alpha / rank; by default alpha = rank.
        modules: linear layers that carry a product.
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
        check_count(self.rank, "the rank of LoRA")
        if isinstance(self.a, str) and self.a not in ("random", "expected"):
            raise ValueError(f"a must be 'random', 'expected' or matrices by module name; got {self.a!r}")
        if self.alpha is not None and not math.isfinite(self.alpha):
            raise ValueError(f"alpha must be finite; got {self.alpha}")
        for name, matrix in {} if isinstance(self.a, str) else self.a.items():
            check_numbers(matrix, f"the matrix A of {name}")

    @property
    def scale(self) -> float:
        """The factor alpha / rank of the product."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def share(self, name: str, parameter: Tensor, module: nn.Module, layer: str | None) -> float:
        """For the mean over A, whose entries have variance 1 / (3 s), a factor of the layer's weight; otherwise 0."""
        if self.a != "expected" or layer is None or not chosen(self.modules, layer):
            return 0.0
        return self._of_weight(parameter.shape[0 if isinstance(module, Conv1D) else 1])

    def _of_weight(self, width: int) -> float:
        return self.scale**2 * self.rank / (3 * width)

    def features(self, layer: Layer) -> Found:
        """The feature of B, ``(r, rank)``; for the mean over A, of the weight, unless :meth:`share` counts it."""
        if layer.x is None:
            return
        assert isinstance(layer.feature, Outer)
        if self.a == "expected":
            if not layer.weighed:
                x = self._of_weight(layer.x.shape[-1]) ** 0.5 * layer.x
                yield "W", torch.Size((layer.y.shape[-1], x.shape[-1])), layer.feature.beside(x)
            return
        a = self._matrix(layer).to(layer.x)
        shape = torch.Size((layer.y.shape[-1], len(a)))
        yield "B", shape, layer.feature.beside(self.scale * (layer.x @ a.T))

    def _matrix(self, layer: Layer) -> Float[Tensor, "rank s"]:
        if isinstance(self.a, str):
            return kaiming_uniform((self.rank, layer.weight.shape[1]), f"{self.seed}.{layer.name}")
        if layer.name not in self.a:
            raise ValueError(f"no matrix A is given for {layer.name}; give one, or leave the layer out of modules")
        return self.a[layer.name]


@dataclass(frozen=True)
class DoRA(LoRA):
    """LoRA on the direction of each weight, and trained lengths m of its rows (Liu et al. 2024).

    At B = 0, d f / d B is the same as for LoRA, since the norm is held constant in the gradient, and
    d f / d m_j = sum_t g_tj (W x_t)_j / |W_j|.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.a == "expected":
            raise ValueError(
                "DoRA takes no a='expected': use LoRA(a='expected') for the mean of its low-rank part over A"
            )

    def features(self, layer: Layer) -> Found:
        """The features of LoRA's matrix and of the lengths."""
        if layer.x is None:
            return
        yield from super().features(layer)
        lengths = layer.weight.norm(dim=1)
        linear = layer.gy.value
        if layer.bias is not None:
            linear = linear - layer.over_tokens(layer.g).value * layer.bias
        yield "m", lengths.shape, Dense(linear / lengths)


@dataclass(frozen=True)
class VeRA(LayerMethod):
    """Trained vectors b = 0 and d around frozen random matrices A, B that all layers share (Kopiczko et al. 2024).

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

    def __post_init__(self) -> None:
        check_numbers(self.a, "the matrix a of VeRA")
        check_numbers(self.b, "the matrix b of VeRA")
        if not math.isfinite(self.initial):
            raise ValueError(f"the initial value of VeRA's d must be finite; got {self.initial}")

    def features(self, layer: Layer) -> Found:
        """The feature of the vector b, of length r."""
        if layer.x is None:
            return
        r, s = layer.weight.shape
        if self.a.shape[1] < s or len(self.b) < r:
            raise ValueError(f"{layer.name} is {r} x {s}: VeRA's matrices {tuple(self.b.shape)} and "
                             f"{tuple(self.a.shape)} are too small")  # fmt: skip
        inner = self.initial * (layer.x @ self.a[:, :s].to(layer.x).T) @ self.b[:r].to(layer.x).T
        yield "b", torch.Size((r,)), layer.over_tokens(layer.g * inner)


@dataclass(frozen=True)
class LoHa(LayerMethod):
    """The elementwise product of two low-rank products beside each weight, at w2_b = 0 (Hyeon-Woo et al. 2022).

        d f / d w2_b = (alpha / rank) w2_a^T (sum_t g_t x_t^T * (w1_a w1_b))

    Attributes:
        rank: of each product.
        alpha: the elementwise product is multiplied by alpha / rank; by default alpha = rank.
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

    def __post_init__(self) -> None:
        check_count(self.rank, "the rank of LoHa")
        if self.alpha is not None and not math.isfinite(self.alpha):
            raise ValueError(f"alpha must be finite; got {self.alpha}")
        for name, factors in (self.factors or {}).items():
            for factor in factors:
                check_numbers(factor, f"a factor of {name}")

    def features(self, layer: Layer) -> Found:
        """The feature of the matrix w2_b, ``(rank, s)``."""
        if layer.x is None:
            return
        r, s = layer.weight.shape
        shapes = {"1a": (r, self.rank), "1b": (self.rank, s), "2a": (r, self.rank)}
        drawn = (kaiming_uniform(shape, f"{self.seed}.{layer.name}.{part}") for part, shape in shapes.items())
        factors = drawn if self.factors is None else self.factors[layer.name]
        w1_a, w1_b, w2_a = (factor.to(layer.g) for factor in factors)
        scale = 1.0 if self.alpha is None else self.alpha / self.rank
        # The inputs x * w1_b[p] of each token are contracted, over tokens and p, with its gradients times column p of
        # w1_a. These inputs are rank times as large as the layer's, so a few examples are taken at a time.
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


@lru_cache(maxsize=1024)
def kaiming_uniform(shape: tuple[int, int], key: str) -> Tensor:
    """A matrix of entries uniform in +-1 / sqrt(columns), as in ``nn.Linear`` and peft, seeded by ``key``."""
    generator = torch.Generator().manual_seed(seed_of(key))
    return torch.empty(shape).uniform_(-1, 1, generator=generator) / math.sqrt(shape[1])
