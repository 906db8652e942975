"""Theorem 1 by the position of a layer in a transformer: the kernel of its scales against that of its own weights.

docs/theory.md (Proposition 10) says that at random weights the two kernels agree, up to fluctuations that fall with the
width, for layers whose outputs enter no elementwise nonlinearity before the next random matrix: for all layers except
the one before the nonlinearity of the feed-forward block.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import ntk
from analyses.subjects.parameters import SelectedParameters
from ntk.adapters import Method, Propulsion, chosen
from ntk.infinite.networks import Recipe, Transformer

# Positions of ntk.infinite.networks.Transformer, with a pattern for the modules of a BERT encoder at that position.
POSITIONS = {
    "embedding": r".*embeddings\.word_embeddings",
    "query": r".*\.self\.query",
    "key": r".*\.self\.key",
    "value": r".*\.self\.value",
    "attention": r".*\.attention\.output\.dense",
    "up": r".*\.intermediate\.dense",
    "down": r".*\.\d+\.output\.dense",
}


def weights_of(modules: str) -> SelectedParameters:
    """Full fine-tuning of the matrices of the modules whose names match a pattern."""
    return SelectedParameters(
        lambda name, parameter: name.endswith(".weight") and chosen(modules, name.removesuffix(".weight"))
    )


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


def encoder_kernels(model: Any, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Kernels of the weights and of the scales of a BERT encoder by position, from one pass."""
    methods: dict[str, Method] = {}
    for position, modules in POSITIONS.items():
        methods |= {f"weights {position}": weights_of(modules), f"multipliers {position}": Propulsion(modules=modules)}
    kernels = ntk.adapter_kernels(model, inputs, methods, reduce="trace")
    parts = ({p: kernels[f"{kind} {p}"].double() for p in POSITIONS} for kind in ("weights", "multipliers"))
    return next(parts), next(parts)


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
