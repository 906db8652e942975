"""Theorem 1 by the position of a layer in a transformer: the kernel of its scales against that of its own weights.

docs/theory.md (Proposition 10) says that at random weights the two kernels agree, up to fluctuations that fall with the
width, for layers whose outputs enter no elementwise nonlinearity before the next random matrix: for all layers except
the one before the nonlinearity of the feed-forward block. `analyses.decomposition` has the layers of pre-trained
models.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import ntk
from ntk.infinite.networks import Recipe, Transformer

POSITIONS = ("embedding", "query", "key", "value", "attention", "up", "down")
"""Positions of `ntk.infinite.networks.Transformer`, by the names of its layers."""


def transformer_kernels(
    width: int, *, depth: int, draws: int, x: Tensor, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Kernels of the weights and of the scales by position, summed over blocks and averaged over networks."""
    weights: dict[str, Tensor] = {}
    multipliers: dict[str, Tensor] = {}
    for draw in range(draws):
        recipe = Recipe(
            generator=torch.Generator().manual_seed(1000 * seed + draw), sigma_w=2**0.5, multipliers="all"
        )  # fmt: skip
        network = Transformer(x.shape[2], width=width, depth=depth, recipe=recipe)
        for name, kernel in ntk.layer_kernels(network, x, reduce="trace").items():
            position = name.removesuffix(".multiplier.z").removesuffix(".weight").rpartition(".")[2]
            if position in POSITIONS:
                found = multipliers if name.endswith(".z") else weights
                found[position] = found.get(position, torch.zeros_like(kernel)) + kernel / draws
    return weights, multipliers


def rows_of(network: str, weights: dict[str, Tensor], multipliers: dict[str, Tensor]) -> Iterator[dict[str, Any]]:
    """Yield one row for each position."""
    for position in POSITIONS:
        own = distances(weights[position], multipliers[position])
        yield {"network": network, "position": position} | own


def distances(full: Tensor, propulsion: Tensor) -> dict[str, float]:
    """Distances of two kernels ``(n, n)``, as they are and after the best single factor, by the table's columns."""
    return {
        "literal": ntk.kernel_distance(full, propulsion),
        "best_scale": ntk.kernel_distance(full, propulsion, scaled=True),
        "cka": ntk.cka(full, propulsion),
        "trace_ratio": ntk.trace_ratio(full, propulsion),
    }
