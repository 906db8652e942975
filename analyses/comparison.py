"""Kernels compared: every metric of every pair, with intervals, and the null models beside them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import ntk
from analyses.bootstrap import bootstrap_interval
from analyses.results import Metric

KERNEL_UNIT = "output²/parameter²"

# Metrics of a pair (K1, K2): name -> (function, unit).
PAIR_METRICS: dict[str, tuple[Callable[[Tensor, Tensor], float], str]] = {
    "alignment": (ntk.kernel_alignment, ""),
    "cka": (ntk.cka, ""),
    "relative_frobenius": (ntk.kernel_distance, ""),
    "relative_frobenius_scaled": (lambda a, b: ntk.kernel_distance(a, b, scaled=True), ""),
    "mean_absolute": (lambda a, b: ntk.kernel_distance(a, b, kind="mean_absolute"), KERNEL_UNIT),
    "mean_absolute_scaled": (lambda a, b: ntk.kernel_distance(a, b, kind="mean_absolute", scaled=True), KERNEL_UNIT),
    "max_absolute": (lambda a, b: ntk.kernel_distance(a, b, kind="max_absolute"), KERNEL_UNIT),
    "max_absolute_scaled": (lambda a, b: ntk.kernel_distance(a, b, kind="max_absolute", scaled=True), KERNEL_UNIT),
    "best_scale": (ntk.best_scale, ""),
    "trace_ratio": (ntk.trace_ratio, ""),
}
# Null models have no scale of their own to get right, so only scale-free metrics judge them.
NULL_METRICS = ("alignment", "cka", "relative_frobenius_scaled")
KERNEL_METRICS: dict[str, tuple[Callable[[Tensor], float], str]] = {
    "trace": (ntk.trace, KERNEL_UNIT),
    "effective_rank": (ntk.effective_rank, ""),
}


@dataclass(frozen=True)
class Comparison:
    """Compares kernels over the same examples, at one stage, with bootstrap intervals.

    Attributes:
        kernels: name -> kernel ``(n, n)``, on the CPU.
        stage: what the metrics are filed under.
        resamples: bootstrap resamples behind each interval.
        seed: seed of the resamples; the same examples are drawn for every metric.
    """

    kernels: Mapping[str, Tensor]
    stage: str
    resamples: int
    seed: int

    def pair(self, left: str, right: str) -> list[Metric]:
        """Every metric of one pair."""
        kernels = [self.kernels[left], self.kernels[right]]
        return [
            self._measure(name, function, unit, kernels, left, right) for name, (function, unit) in PAIR_METRICS.items()
        ]

    def single(self, name: str) -> list[Metric]:
        """Every metric of one kernel."""
        return [
            self._measure(metric, function, unit, [self.kernels[name]], name, "")
            for metric, (function, unit) in KERNEL_METRICS.items()
        ]

    def matching_degree(self, full: str, propulsion: str, degree: float) -> Metric:
        """k* of a pair whose Propulsion kernel was taken at ``degree`` and z = 1, where K_P(k) = k^2 K_P(1)."""
        kernels = [self.kernels[full], self.kernels[propulsion] / degree**2]
        return self._measure("k_star", ntk.matching_degree, "", kernels, full, propulsion)

    def null(self, full: str, null: str, draws: Sequence[Tensor]) -> list[Metric]:
        """The scale-free metrics of a null model against one kernel.

        Averaged over its draws, undefined if one draw is; the interval reaches from the lowest end to the highest of
        the draws' intervals.
        """
        metrics = []
        for name in NULL_METRICS:
            function, unit = PAIR_METRICS[name]
            found = [self._measure(name, function, unit, [self.kernels[full], draw], full, null) for draw in draws]
            values, lows, highs = np.array([(m.value, m.low, m.high) for m in found]).T
            mean, low, high = float(values.mean()), float(lows.min()), float(highs.max())
            metrics.append(Metric(name, mean, low, high, unit, self.stage, full, null))
        return metrics

    def _measure(
        self, name: str, function: Callable[..., float], unit: str, kernels: list[Tensor], left: str, right: str
    ) -> Metric:
        value, low, high = bootstrap_interval(function, kernels, resamples=self.resamples, seed=self.seed)
        return Metric(name, value, low, high, unit, self.stage, left, right)


def null_kernels(
    full: Tensor, adapter: Tensor, m: int, *, draws: int, generator: torch.Generator
) -> dict[str, list[Tensor]]:
    """The nulls that need no model: a Gaussian sketch of K_F ``(n, n, c, c)``, and the adapter's kernel permuted."""
    return {
        f"Gaussian sketch of size {m:,}": [
            ntk.reduce_outputs(ntk.gaussian_sketch(full, m, generator=generator), "trace") for _ in range(draws)
        ],
        "Propulsion, examples permuted": [ntk.permuted(adapter, generator=generator) for _ in range(draws)],
    }
