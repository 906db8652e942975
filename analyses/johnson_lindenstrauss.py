"""Does a random projection preserve inner products, as the paper's Theorem 1 says, and how sharp is its bound?

For unit x, x' with x.x' = rho and Gaussian W of d rows, S = (W x).(W x') / d is drawn many times for every d and rho.
The draws are compared with the bound Pr[|S - rho| >= eps] <= 4 exp(-(eps^2 - eps^3) d / 4), with the exact probability,
and with the exact variance (1 + rho^2) / d (`ntk.bounds`).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import norm

from analyses.core.analysis import Analysis, Findings, Output
from analyses.records import Block, Metric, Result, number, summary_of_blocks
from ntk.bounds import clopper_pearson, simulate, tail, tail_bound, variance
from propulsion.errors import UserError

COST = "half a minute"

# Below this value the exact tail probability is not accurate.
SMALLEST = 1e-40


@dataclass(frozen=True)
class Config(Output):
    """Options of the analysis."""

    dimensions: tuple[int, ...] = (4, 16, 64, 128, 256, 512, 1024, 4096)
    """Dimensions d: the width of Theorem 1, or the rank of LoRA."""
    epsilons: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4, 0.8)
    """Errors eps, between 0 and 1."""
    rhos: tuple[float, ...] = (-0.9, -0.3, 0.0, 0.5, 1.0)
    """Inner products rho of the unit vectors."""
    draws: int = 20_000
    """Draws of each projection."""
    confidence: float = 0.999
    """Confidence level of every interval."""
    seed: int = 0
    """Seed of the draws."""


def find(config: Config) -> Findings:
    """Draw projections, and compare them with the bound and the exact values."""
    generator = torch.Generator().manual_seed(config.seed)
    cells, variances = [], []
    for d in config.dimensions:
        print(f"dimension {d} ...", flush=True)
        for rho in config.rhos:
            x = torch.tensor([1.0, 0.0], dtype=torch.float64)
            x2 = torch.tensor([rho, math.sqrt(1 - rho**2)], dtype=torch.float64)
            S = simulate(x, x2, d, draws=config.draws, generator=generator)
            variances.append(_variance_row(d, rho, S.numpy(), config.confidence))
            for epsilon in config.epsilons:
                exceed = int(((S - rho).abs() >= epsilon).sum())
                found = clopper_pearson(exceed, config.draws, config.confidence)
                cells.append({
                    "d": d, "rho": rho, "epsilon": epsilon, "probability": found.probability, "lower": found.lower,
                    "upper": found.upper, "bound": tail_bound(d, epsilon), "exact": tail(d, epsilon, rho),
                })  # fmt: skip
    # Bound over exact probability, where the bound is below 1 and the exact probability is accurate.
    sharpness = [c["bound"] / c["exact"] for c in cells if c["bound"] < 1 and c["exact"] > SMALLEST]
    counts = {
        "cells": len(cells),
        "cells_above_bound": sum(cell["lower"] > cell["bound"] for cell in cells),
        "cells_beside_exact_tail": sum(not cell["lower"] <= cell["exact"] <= cell["upper"] for cell in cells),
        "variances": len(variances),
        "variances_beside_exact": sum(not row["lower"] <= row["exact"] <= row["upper"] for row in variances),
        "median_bound_over_exact": float(np.median(sharpness)) if sharpness else math.nan,
    }
    return Findings(
        metrics=[
            Metric(name, float(v), None, None, "", "initialisation", "projection", "") for name, v in counts.items()
        ],
        tables={"tail": cells, "variance": variances, "curves": _curves(config)},
        model={"name": "one random linear layer"},
        dataset={"name": "unit vectors"},
    )


def _curves(config: Config) -> list[dict[str, float]]:
    """Bound and exact tail at 80 dimensions between the smallest and the largest, for the largest rho below 1."""
    rho = max([r for r in config.rhos if r < 1], default=config.rhos[0])
    dimensions = sorted({round(d) for d in np.geomspace(min(config.dimensions), max(config.dimensions), 80)})
    return [
        {"d": d, "rho": rho, "epsilon": e, "bound": tail_bound(d, e), "exact": tail(d, e, rho)}
        for e in config.epsilons for d in dimensions
    ]  # fmt: skip


def _variance_row(d: int, rho: float, S: np.ndarray, confidence: float) -> dict[str, float]:
    """The sample variance around the known mean rho, with the normal interval of a mean of squares."""
    squares = (S - rho) ** 2
    half = float(norm.ppf((1 + confidence) / 2)) * squares.std(ddof=1) / math.sqrt(len(S))
    found = float(squares.mean())
    return {"d": d, "rho": rho, "variance": found, "lower": found - half, "upper": found + half,
            "exact": variance(d, rho)}  # fmt: skip


def _check(config: Config) -> None:
    for name, allowed in (
        ("dimensions", lambda v: v >= 1), ("epsilons", lambda v: 0 < v < 1), ("rhos", lambda v: -1 <= v <= 1),
    ):  # fmt: skip
        values = getattr(config, name)
        if not values or not all(allowed(v) for v in values):
            raise UserError(f"{name} are out of range: {values}; d >= 1, 0 < eps < 1, -1 <= rho <= 1")
    if not 0 < config.confidence < 1:
        raise UserError(f"confidence must lie between 0 and 1; got {config.confidence}")


@summary_of_blocks
def summary(result: Result) -> Iterator[Block]:
    """The tail by dimension, for the middle rho and eps; then in how many cells bounds and intervals are exceeded."""
    rho, epsilon = (sorted(result.config[name])[len(result.config[name]) // 2] for name in ("rhos", "epsilons"))
    chosen = [c for c in result.tables["tail"] if (c["rho"], c["epsilon"]) == (rho, epsilon)]
    yield f"rho = {rho:g}, eps = {epsilon:g}"
    rows = [[str(int(c["d"])), number(c["probability"]), number(c["exact"]), number(c["bound"])] for c in chosen]
    yield ["d", "drawn", "exact", "bound"], rows
    counts = {m.name: m.value for m in result.metrics}
    yield (
        f"bound exceeded in {counts['cells_above_bound']:.0f} of {counts['cells']:.0f} cells; exact tail outside the "
        f"interval in {counts['cells_beside_exact_tail']:.0f}, exact variance in "
        f"{counts['variances_beside_exact']:.0f} of {counts['variances']:.0f}; where the bound is below 1, it is "
        f"{number(counts['median_bound_over_exact'])} times the exact probability (median)"
    )


ANALYSIS = Analysis(
    "johnson_lindenstrauss", Config, find, summary,
    least={"draws": 100},
    check=_check,
    about=lambda config: f"intervals: {config.confidence:.1%}",
)  # fmt: skip
run = ANALYSIS.run

if __name__ == "__main__":
    ANALYSIS.command(__doc__)
