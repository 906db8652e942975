"""Do the kernels of finite networks reach their limits, how fast, and does the gap between them close?

The kernels of random multilayer perceptrons of growing width, for every activation and in both parametrisations, are
compared with `ntk.infinite.mlp_kernels`. The error of both kernels should fall as 1/sqrt(width). Their gap over the
hidden layers, K_P / k^2 - K_F of the layers that have scales, should not close except for linear networks, while its
fluctuation between networks falls. In standard parametrisation the kernel of full fine-tuning grows with the width, and
Propulsion's is the same as in NTK parametrisation.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from analyses.core.analysis import Analysis, Findings, Output
from analyses.records import Block, Metric, Result, metric_cell, number, summary_of_blocks
from ntk.infinite import ACTIVATIONS, mlp_kernels
from ntk.infinite.networks import MLP, PARAMETRIZATIONS, Recipe, is_multiplier
from propulsion.errors import UserError, did_you_mean

COST = "half a minute"


@dataclass(frozen=True)
class Config(Output):
    """Options of the analysis."""

    activations: tuple[str, ...] = tuple(ACTIVATIONS)
    """Activations, by their names in ntk.infinite."""
    widths: tuple[int, ...] = (32, 64, 128, 256, 512, 1024)
    """Widths of the hidden layers."""
    depth: int = 2
    """Number of hidden layers."""
    draws: int = 12
    """Networks of the largest width; smaller widths have proportionally more, up to eight times as many."""
    inputs: int = 4
    """Number of random inputs, of 5 coordinates each."""
    degree: int = 1
    """Propulsion's degree."""
    sigma_w: float = 1.4
    """Standard deviation of the weights."""
    sigma_b: float = 0.3
    """Standard deviation of the biases."""
    confidence: float = 0.95
    """Confidence level of the slopes' intervals, by bootstrap over networks."""
    seed: int = 0
    """Seed of the inputs, networks and resamples."""


def find(config: Config) -> Findings:
    """Draw networks, compare their kernels with the limits, and fit the slopes of the errors."""
    generator = torch.Generator().manual_seed(config.seed)
    x = torch.randn(config.inputs, 5, generator=generator, dtype=torch.float64)
    rows, metrics = [], []
    for activation in config.activations:
        limit = mlp_kernels(
            x, depth=config.depth, activation=activation, sigma_w=config.sigma_w, sigma_b=config.sigma_b,
            degree=config.degree,
        )  # fmt: skip
        print(f"{activation} ...", flush=True)
        for parametrization in PARAMETRIZATIONS:
            found = {w: _kernels(x, w, activation, parametrization, config) for w in config.widths}
            errors = {w: _errors(found[w], limit.ntk, limit.propulsion) for w in config.widths}
            rows += [
                _row(activation, parametrization, w, found[w], errors[w], limit, config.degree) for w in config.widths
            ]
            for name in ("full", "propulsion") if parametrization == "ntk" else ("propulsion",):
                slope, low, high = _slope(config.widths, [errors[w][name] for w in config.widths], config)
                label = f"{activation}, {parametrization}"
                metrics.append(
                    Metric("slope", slope, low, high, "per factor e of width", "initialisation", name, label)
                )
    return Findings(
        metrics,
        tables={"widths": rows},
        arrays={"inputs": x.numpy()},
        model={"name": f"multilayer perceptrons of {config.depth} hidden layers"},
        dataset={"name": f"{config.inputs} Gaussian inputs"},
        coverage={"full": "every weight and bias", "propulsion": "a multiplier on every hidden layer"},
    )


def _kernels(x: Tensor, width: int, activation: str, parametrization: str, config: Config) -> Tensor:
    """Kernels ``(draws, 3, n, n)`` of full fine-tuning, Propulsion, and full fine-tuning of the hidden layers."""
    found = []
    for draw in range(config.draws * min(8, max(1, max(config.widths) // width))):
        recipe = Recipe(
            generator=torch.Generator().manual_seed(1000 * config.seed + draw),
            sigma_w=config.sigma_w, sigma_b=config.sigma_b, parametrization=parametrization, multipliers="hidden",
            degree=config.degree,
        )  # fmt: skip
        network = MLP(x.shape[1], width=width, depth=config.depth, activation=activation, recipe=recipe)
        layers = _layer_kernels(network, x)
        parameters = dict(network.named_parameters())
        multipliers = [k for name, k in layers.items() if is_multiplier(name, parameters[name])]
        full = {name: k for name, k in layers.items() if not is_multiplier(name, parameters[name])}
        hidden = [k for name, k in full.items() if not name.startswith(f"layers.{config.depth}.")]
        found.append(torch.stack([torch.stack(part).sum(0) for part in (list(full.values()), multipliers, hidden)]))
    return torch.stack(found)


def _layer_kernels(network: MLP, x: Tensor) -> dict[str, Tensor]:
    """`ntk.layer_kernels` of a network of one output, from the plain Jacobian; much faster for many small networks."""
    parameters = dict(network.named_parameters())
    rows = [torch.autograd.grad(f, list(parameters.values()), retain_graph=True) for f in network(x)[:, 0]]
    jacobians = (torch.stack([g.flatten() for g in gradients]) for gradients in zip(*rows, strict=True))
    return {name: J @ J.T for name, J in zip(parameters, jacobians, strict=True)}


def _errors(found: Tensor, full: Tensor, propulsion: Tensor) -> dict[str, np.ndarray]:
    """Relative distance (Frobenius) of each network's kernels from the limits, ``(draws,)`` for each kernel."""
    return {
        name: ((found[:, i] - limit).flatten(1).norm(dim=1) / limit.norm()).numpy()
        for i, (name, limit) in enumerate((("full", full), ("propulsion", propulsion)))
    }


def _row(activation, parametrization, width, found, errors, limit, degree) -> dict[str, float | str]:
    mean = found.mean(dim=0)
    gaps = found[:, 1] / degree**2 - found[:, 2]
    hidden = (limit.layers.weights + limit.layers.biases)[:-1].sum(0).norm()
    return {
        "activation": activation,
        "parametrization": parametrization,
        "width": width,
        "error_full": _root_mean_square(errors["full"]),
        "error_propulsion": _root_mean_square(errors["propulsion"]),
        "gap": float(gaps.mean(0).norm() / hidden),
        "gap_scatter": float((gaps - gaps.mean(0)).flatten(1).norm(dim=1).square().mean().sqrt() / hidden),
        "gap_of_the_limits": float(limit.layers.gap.sum(0).norm() / hidden),
        "trace_ratio": float(mean[0].trace() / mean[1].trace()),
    }


def _slope(widths: tuple[int, ...], errors: list[np.ndarray], config: Config) -> tuple[float, float, float]:
    """Slope of log error over log width, with its bootstrap interval over networks: (slope, low, high)."""
    rng = np.random.default_rng(config.seed)

    def fit(pick: Callable[[np.ndarray], np.ndarray]) -> float:
        return float(np.polyfit(np.log(widths), np.log([_root_mean_square(pick(e)) for e in errors]), 1)[0])

    resampled = [fit(lambda e: rng.choice(e, len(e))) for _ in range(500)]
    side = (1 - config.confidence) / 2
    low, high = np.quantile(resampled, [side, 1 - side])
    return fit(lambda e: e), float(low), float(high)


def _root_mean_square(values: np.ndarray) -> float:
    return math.sqrt(float(np.mean(values**2)))


def _check(config: Config) -> None:
    if not 0 < config.confidence < 1:
        raise UserError(f"confidence must lie between 0 and 1; got {config.confidence}")
    if not config.activations:
        raise UserError(f"activations must name one at least of {', '.join(ACTIVATIONS)}")
    if unknown := [a for a in config.activations if a not in ACTIVATIONS]:
        close = did_you_mean(unknown[0], ACTIVATIONS)
        raise UserError(f"unknown activation {unknown[0]!r}{close}; there are {', '.join(ACTIVATIONS)}")
    if len(config.widths) < 2:
        raise UserError(f"there must be at least two widths to fit a slope; got {config.widths}")


@summary_of_blocks
def summary(result: Result) -> Iterator[Block]:
    """One row for each activation: the slopes, the gap at the largest width and the gap of the limits."""
    rows = []
    widest = max(result.config["widths"])
    for row in result.tables["widths"]:
        if (row["parametrization"], row["width"]) == ("ntk", widest):
            activation = row["activation"]
            slopes = [
                metric_cell(result.metric("slope", stage="initialisation", left=kernel, right=f"{activation}, ntk"))
                for kernel in ("full", "propulsion")
            ]
            rows.append([activation, *slopes, number(row["gap"]), number(row["gap_of_the_limits"])])
    yield ["activation", "slope, K_F", "slope, K_P", f"gap at {widest}", "gap of the limits"], rows


ANALYSIS = Analysis(
    "width_convergence", Config, find, summary,
    least={"widths": 1, "draws": 2, "inputs": 2, "depth": 1, "sigma_b": 0},
    above={"sigma_w": 0, "degree": 0},
    check=_check,
    about=lambda config: (
        f"gaps relative to K_F of the hidden layers; intervals: {config.confidence:.0%}, over networks"
    ),
)  # fmt: skip
run = ANALYSIS.run

if __name__ == "__main__":
    ANALYSIS.command(__doc__)
