"""Finite random networks in two parametrisations, whose kernels approach the limits of :mod:`ntk.infinite`.

A layer with n inputs computes

| parametrisation | stored weights    | layer                                 | kernel of W                         |
|-----------------|-------------------|---------------------------------------|-------------------------------------|
| ``"ntk"``       | N(0, 1)           | (sigma_w / sqrt(n)) W a + sigma_b b   | K                                   |
| ``"standard"``  | N(0, sigma_w^2/n) | W a + b, with b of variance sigma_b^2 | (n / sigma_w^2) K                   |

One generator state gives the same function in both, so kernels of parameters that are not weights or biases, such as
Propulsion's multipliers, are equal. Parameters are drawn from the ``generator`` in order of construction.

A Propulsion multiplier z, initially 1, is a parameter at the positions that a :class:`Recipe` names, where
y = z^k * (layer's output). :func:`is_multiplier` selects the multipliers for :func:`ntk.empirical_ntk`.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ntk.infinite.activations import Activation, find
from ntk.infinite.gaussian import LARGEST

PARAMETRIZATIONS = ("ntk", "standard")

Position = str | int


class Multiplier(nn.Module):
    """Multiplies the last axis of y by z^degree; z of shape (n,) is initially 1."""

    def __init__(self, n: int, degree: int | float = 1, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.degree = degree
        self.z = nn.Parameter(torch.ones(n, dtype=dtype))

    def forward(self, y: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
        """z^degree * y."""
        return y * self.z**self.degree


def check_branch_scale(branch_scale: float) -> None:
    """Raise ValueError for a branch scale that is not finite or whose powers overflow."""
    if not abs(branch_scale) <= LARGEST:
        raise ValueError(f"branch_scale must be finite, at most {LARGEST:g}; got {branch_scale}")


def is_multiplier(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter of one of these networks is a Propulsion multiplier; may be passed as ``params=``."""
    return name == "z" or name.endswith(".z")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of a random network: scales, parametrisation, multipliers, and the generator of its parameters.

    Attributes:
        generator: draws every parameter.
        sigma_w: standard deviation of the weights, in the sense of the table above.
        sigma_b: standard deviation of the biases; 0 for layers without bias.
        parametrization: ``"ntk"`` or ``"standard"``.
        multipliers: the positions that get a Propulsion multiplier: ``"all"``, ``"hidden"`` (all but the input and
            readout), or a collection of the network's ``positions``.
        degree: k of z^k.
        dtype: of every parameter.

    Raises:
        ValueError: unknown parametrisation, or scales out of range.
    """

    generator: torch.Generator
    sigma_w: int | float = 1.0
    sigma_b: int | float = 0.0
    parametrization: str = "ntk"
    multipliers: str | Collection[Position] = ()
    degree: int | float = 1
    dtype: torch.dtype = torch.float64

    def __post_init__(self) -> None:
        if self.parametrization not in PARAMETRIZATIONS:
            raise ValueError(
                f"parametrization must be one of {', '.join(map(repr, PARAMETRIZATIONS))}; got {self.parametrization!r}"
            )
        if not (0 < self.sigma_w < math.inf and 0 <= self.sigma_b < math.inf):
            raise ValueError(
                f"expected sigma_w > 0 and sigma_b >= 0, both finite; got {self.sigma_w} and {self.sigma_b}"
            )
        if not math.isfinite(self.degree):
            raise ValueError(f"degree must be finite; got {self.degree}")

    def chosen(self, positions: tuple[Position, ...]) -> frozenset[Position]:
        """The positions of multipliers, after a check that the network has them."""
        if self.multipliers == "all":
            return frozenset(positions)
        if self.multipliers == "hidden":
            return frozenset(positions) - {"input", "readout"}
        wrong = [self.multipliers] if isinstance(self.multipliers, str) else set(self.multipliers) - set(positions)
        if wrong:
            raise ValueError(f"multipliers must be 'all', 'hidden' or among {positions}; got {self.multipliers!r}")
        return frozenset(self.multipliers)

    def multiplier(self, n: int, wanted: bool) -> nn.Module:
        """A multiplier of length n, or the identity."""
        return Multiplier(n, self.degree, self.dtype) if wanted else nn.Identity()

    def linear(self, n_in: int, n_out: int, multiplied: bool) -> "ScaledLinear":
        """A new layer with parameters drawn from the generator."""
        return ScaledLinear(n_in, n_out, self, multiplied)


class ScaledLinear(nn.Module):
    """A linear layer in either parametrisation, with a multiplier or without; see the table of this module."""

    def __init__(self, n_in: int, n_out: int, recipe: Recipe, multiplied: bool) -> None:
        super().__init__()
        if n_in < 1 or n_out < 1:
            raise ValueError(f"a layer needs at least one input and one output; got {n_in} and {n_out}")

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=recipe.generator, dtype=recipe.dtype, device=recipe.generator.device)

        w, b = recipe.sigma_w / math.sqrt(n_in), recipe.sigma_b
        ntk = recipe.parametrization == "ntk"
        self.weight_scale, self.bias_scale = (w, b) if ntk else (1.0, 1.0)
        self.weight = nn.Parameter(draw(n_out, n_in).mul_(1.0 if ntk else w))
        self.bias = nn.Parameter(draw(n_out).mul_(1.0 if ntk else b)) if recipe.sigma_b > 0 else None
        self.multiplier = recipe.multiplier(n_out, multiplied)

    def forward(self, a: Float[Tensor, "... n_in"]) -> Float[Tensor, "... n_out"]:
        """z^k * (weight_scale W a + bias_scale b)."""
        v = self.weight_scale * nn.functional.linear(a, self.weight)
        return self.multiplier(v if self.bias is None else v + self.bias_scale * self.bias)


class MLP(nn.Module):
    """The multilayer perceptron whose limit is :func:`ntk.infinite.mlp_kernels`: (n, n_in) -> (n, n_out).

    Positions of multipliers: ``"input"``, the hidden layers 1..depth, ``"readout"``.

    Example:
        >>> recipe = Recipe(generator=torch.Generator().manual_seed(0), sigma_w=2**0.5, multipliers="hidden")
        >>> network = MLP(3, width=8, depth=2, recipe=recipe, activation="relu")
        >>> network(torch.ones(5, 3, dtype=torch.float64)).shape
        torch.Size([5, 1])
    """

    def __init__(
        self,
        n_in: int,
        *,
        width: int,
        depth: int,
        recipe: Recipe,
        activation: str | Activation | Callable[[Tensor], Tensor],
        n_out: int = 1,
    ) -> None:
        super().__init__()
        if depth < 0:
            raise ValueError(f"depth, the number of hidden layers, must be at least 0; got {depth}")
        self.positions: tuple[Position, ...] = ("input", *range(1, depth + 1), "readout")
        self.phi = find(activation).function
        chosen = recipe.chosen(self.positions)
        sizes = [n_in, *[width] * depth, n_out]
        self.input_multiplier = recipe.multiplier(n_in, "input" in chosen)
        self.layers = nn.ModuleList(
            recipe.linear(sizes[i], sizes[i + 1], name in chosen) for i, name in enumerate(self.positions[1:])
        )

    def forward(self, x: Float[Tensor, "n n_in"]) -> Float[Tensor, "n n_out"]:
        """The outputs."""
        h = self.layers[0](self.input_multiplier(x))
        for layer in list(self.layers)[1:]:
            h = layer(self.phi(h))
        return h


class ResidualMLP(nn.Module):
    """h^1 = W^1 x, h^{l+1} = h^l + branch_scale W^{l+1} phi(h^l) for l < depth, f = readout of phi(h^depth).

    Positions as in :class:`MLP`; a multiplier scales its branch, not the sum.
    """

    def __init__(
        self,
        n_in: int,
        *,
        width: int,
        depth: int,
        recipe: Recipe,
        activation: str | Activation | Callable[[Tensor], Tensor],
        n_out: int = 1,
        branch_scale: int | float = 1.0,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"a residual network needs at least one hidden layer; got depth {depth}")
        check_branch_scale(branch_scale)
        self.positions: tuple[Position, ...] = ("input", *range(1, depth + 1), "readout")
        self.phi, self.branch_scale = find(activation).function, float(branch_scale)
        chosen = recipe.chosen(self.positions)
        self.input_multiplier = recipe.multiplier(n_in, "input" in chosen)
        self.stem = recipe.linear(n_in, width, 1 in chosen)
        self.branches = nn.ModuleList(recipe.linear(width, width, layer in chosen) for layer in range(2, depth + 1))
        self.readout = recipe.linear(width, n_out, "readout" in chosen)

    def forward(self, x: Float[Tensor, "n n_in"]) -> Float[Tensor, "n n_out"]:
        """The outputs."""
        h = self.stem(self.input_multiplier(x))
        for branch in self.branches:
            h = h + self.branch_scale * branch(self.phi(h))
        return self.readout(self.phi(h))


class Transformer(nn.Module):
    """A small pre-norm encoder over vectors, averaged over tokens: (n, t, n_in) -> (n, n_out).

    Each block is h + attention(norm(h)), then h + down(phi(up(norm(h)))). There is no mask.
    Positions of multipliers: ``"input"``, ``"embedding"``, ``"<block>.query"`` and likewise key, value, attention (its
    output), up, down, and ``"readout"``.

    Args:
        n_in: length of a token's vector.
        width: of the residual stream; a multiple of ``heads``.
        depth: number of blocks.
        heads: attention heads.
        tokens_mix: softmax(q.k / sqrt(d)), ``"sqrt"``, or softmax(q.k / d), ``"linear"``, whose logits converge as the
            width d of a head grows (Yang 2019).
        layer_norm: False leaves the norms out.
    """

    BLOCK = ("query", "key", "value", "attention", "up", "down")

    def __init__(
        self,
        n_in: int,
        *,
        width: int,
        depth: int,
        recipe: Recipe,
        activation: str | Activation | Callable[[Tensor], Tensor] = "gelu",
        n_out: int = 1,
        heads: int = 2,
        tokens_mix: str = "sqrt",
        layer_norm: bool = True,
    ) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"width must be a multiple of the number of heads; got {width} and {heads}")
        if tokens_mix not in ("sqrt", "linear"):
            raise ValueError(f"tokens_mix must be 'sqrt' or 'linear'; got {tokens_mix!r}")
        blocks = tuple(f"{block}.{name}" for block in range(depth) for name in self.BLOCK)
        self.positions: tuple[Position, ...] = ("input", "embedding", *blocks, "readout")
        self.phi, self.heads = find(activation).function, heads
        self.logit_scale = (width // heads) ** (-0.5 if tokens_mix == "sqrt" else -1.0)
        chosen = recipe.chosen(self.positions)
        self.input_multiplier = recipe.multiplier(n_in, "input" in chosen)
        self.embedding = recipe.linear(n_in, width, "embedding" in chosen)
        sizes = {"up": (width, 4 * width), "down": (4 * width, width)}
        device = recipe.generator.device
        norm = partial(nn.LayerNorm, width, dtype=recipe.dtype, device=device) if layer_norm else nn.Identity
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {name: recipe.linear(*sizes.get(name, (width, width)), f"{b}.{name}" in chosen) for name in self.BLOCK}
                | {f"norm_{part}": norm() for part in ("attention", "mlp")}
            )
            for b in range(depth)
        )
        self.readout = recipe.linear(width, n_out, "readout" in chosen)

    def forward(self, x: Float[Tensor, "n t n_in"]) -> Float[Tensor, "n n_out"]:
        """The outputs."""
        h = self.embedding(self.input_multiplier(x))
        for block in self.blocks:
            assert isinstance(block, nn.ModuleDict)
            a = block["norm_attention"](h)
            q, k, v = (self._split(block[name](a)) for name in ("query", "key", "value"))
            mixed = torch.softmax(self.logit_scale * q @ k.transpose(-1, -2), dim=-1) @ v
            h = h + block["attention"](mixed.transpose(1, 2).flatten(2))
            h = h + block["down"](self.phi(block["up"](block["norm_mlp"](h))))
        return self.readout(h.mean(dim=1))

    def _split(self, v: Tensor) -> Tensor:
        """(n, t, width) -> (n, heads, t, width / heads)."""
        return v.unflatten(-1, (self.heads, -1)).transpose(1, 2)
