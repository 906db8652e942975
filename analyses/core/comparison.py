"""Kernels of several seeds compared: every metric as the mean over seeds, its interval, and its value in each seed.

Every seed draws its own examples, so that the scatter over seeds contains that over examples: the interval is Student's
over the seeds, on the metric's scale. A single seed has a bootstrap interval over its examples.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ntk
from analyses.core.bootstrap import bootstrap_interval
from analyses.core.intervals import Interval, Scale, between
from analyses.core.scales import bounded_mean, scale_of
from analyses.records import Metric, Result, interval
from ntk import UndefinedMetricError

Function = Callable[..., float]
KERNEL_UNIT = "output²/parameter²"

# Metrics of a pair (K1, K2): name -> (function, unit).
PAIR_METRICS: dict[str, tuple[Callable[[Tensor, Tensor], float], str]] = {
    "alignment": (ntk.kernel_alignment, ""),
    "cka": (ntk.cka, ""),
    **{
        f"{kind}{suffix}": (partial(ntk.kernel_distance, kind=kind, scaled=suffix == "_scaled"), unit)
        for kind, unit in (("relative_frobenius", ""), ("mean_absolute", KERNEL_UNIT), ("max_absolute", KERNEL_UNIT))
        for suffix in ("", "_scaled")
    },
    "best_scale": (ntk.best_scale, ""),
    "trace_ratio": (ntk.trace_ratio, ""),
}
# Null models have no scale of their own to get right, so only scale-free metrics judge them.
NULL_METRICS = ("alignment", "cka", "relative_frobenius_scaled")
KERNEL_METRICS: dict[str, tuple[Callable[[Tensor], float], str]] = {
    "trace": (ntk.trace, KERNEL_UNIT),
    "effective_rank": (ntk.effective_rank, ""),
}


def directions(result: Result, kernel: str, cka: Metric | float | None) -> str:
    """The text of a CKA's equivalent number of random directions (:func:`ntk.equivalent_directions`) with its interval.

    The participation ratio is that of a stored kernel, which is of the first seed. The CKA is the mean over seeds, and
    the ends belong to the ends of its interval. "-" stands for no CKA, no stored kernel, and a CKA of 1, which only
    infinitely many directions reach.

    Args:
        result: The result.
        kernel: Name of the array of the kernel that the CKA compares with.
        cka: The CKA.
    """
    if cka is None or kernel not in result.arrays:
        return "-"
    K = torch.from_numpy(result.arrays[kernel]).double()
    values = (cka.value, cka.low, cka.high) if isinstance(cka, Metric) else (cka, None, None)
    return interval(*(None if x is None else _directions(K, x) for x in values))


def _directions(K: Tensor, cka: float) -> float:
    return math.nan if math.isnan(cka) else ntk.equivalent_directions(K, min(max(cka, 0.0), 1.0))


def over_seeds(seeds: Sequence[int], n_examples: int) -> str:
    """A phrase for tables that says over what the intervals of a `SeedComparison` are."""
    return f"Student's over {len(seeds)} seeds" if len(seeds) > 1 else f"bootstrap over {n_examples} examples"


def draw_name(null: str, draw: int) -> str:
    """The name of one draw of a null model among the kernels."""
    return f"{null} ({draw})"


@dataclass(frozen=True)
class SeedComparison:
    """Metrics of kernels that were computed once for each of several seeds, on that seed's examples.

    Attributes:
        kernels: For each seed, kernels ``(n, n)`` by name.
        seeds: The seeds.
        stage: The stage that the metrics name, such as "initialisation".
        resamples: Number of bootstrap resamples for each interval.
        seed: Seed of the resamples; the same examples are drawn for every metric.
        values: The value of every metric in every seed, added by `keep` and `null`: rows of seed, metric, left, right
            and value.
    """

    kernels: Sequence[Mapping[str, Tensor]]
    seeds: Sequence[int]
    stage: str
    resamples: int
    seed: int = 0
    values: list[dict[str, Any]] = field(default_factory=list)

    def pair(self, left: str, right: str) -> list[Metric]:
        """All metrics of `PAIR_METRICS` of two kernels."""
        return [self.metric(name, left, right) for name in PAIR_METRICS]

    def single(self, name: str) -> list[Metric]:
        """All metrics of `KERNEL_METRICS` of one kernel."""
        return [self.metric(metric, name) for metric in KERNEL_METRICS]

    def metric(self, name: str, left: str, right: str = "") -> Metric:
        """A metric of one kernel or of a pair, by its name in `PAIR_METRICS` or `KERNEL_METRICS`."""
        function, unit = (PAIR_METRICS if right else KERNEL_METRICS)[name]
        return self.keep(name, function, unit, left, right)

    def keep(self, name: str, function: Function, unit: str, left: str, right: str = "") -> Metric:
        """Return what :meth:`measure` returns, and add the value of each seed to `values`."""
        self._note(name, left, right, [defined(function, *kernels) for kernels in self._operands(left, right)])
        return self.measure(name, function, unit, left, right)

    def measure(self, name: str, function: Function, unit: str, left: str, right: str = "") -> Metric:
        """The mean over seeds of a function of one kernel or two, with its interval on the scale of the name."""
        return Metric(name, *self._interval(name, function, left, right), unit, self.stage, left, right)

    def mean(self, function: Function, left: str, right: str = "") -> float:
        """The mean over seeds alone; not-a-number if the function is undefined in one."""
        return float(np.mean([defined(function, *kernels) for kernels in self._operands(left, right)]))

    def nulls(self, full: str, counts: Mapping[str, int]) -> list[Metric]:
        """The scale-free metrics of one kernel and each null model; `counts` gives a null model's number of draws."""
        return [
            metric
            for null, count in counts.items()
            for metric in self.null(full, null, [draw_name(null, draw) for draw in range(count)])
        ]

    def null(self, full: str, null: str, draws: Sequence[str]) -> list[Metric]:
        """The scale-free metrics of one kernel and a null model, whose draws are the kernels named in `draws`.

        The value of a seed is the mean over the draws, and undefined if it is undefined for one draw. The interval of a
        single seed reaches from the lowest end to the highest end of the draws' intervals.
        """
        metrics = []
        for name in NULL_METRICS:
            function, unit = PAIR_METRICS[name]
            by_draw = [[defined(function, *kernels) for kernels in self._operands(full, draw)] for draw in draws]
            values = np.mean(by_draw, axis=0).tolist()
            if len(values) > 1:
                found = bounded_mean(values, self._scale(name))
            else:
                ends = [self._interval(name, function, full, draw) for draw in draws]
                found = Interval(values[0], min(e.low for e in ends), max(e.high for e in ends))
            metrics.append(Metric(name, *found, unit, self.stage, full, null))
            self._note(name, full, null, values)
        return metrics

    def _operands(self, left: str, right: str) -> list[list[Tensor]]:
        names = [left, right] if right else [left]
        return [[kernels[name] for name in names] for kernels in self.kernels]

    def _scale(self, name: str) -> Scale:
        if name == "effective_rank":
            return between(1.0, float(len(next(iter(self.kernels[0].values())))))
        return scale_of(name)

    def _interval(self, name: str, function: Function, left: str, right: str) -> Interval:
        scale, operands = self._scale(name), self._operands(left, right)
        if len(operands) > 1:
            return bounded_mean([defined(function, *kernels) for kernels in operands], scale)
        (kernels,) = operands
        return bootstrap_interval(function, kernels, resamples=self.resamples, seed=self.seed, scale=scale)

    def _note(self, metric: str, left: str, right: str, values: Sequence[float]) -> None:
        self.values.extend(
            {"seed": seed, "metric": metric, "left": left, "right": right, "value": value}
            for seed, value in zip(self.seeds, values, strict=True)
        )


def defined(function: Function, *kernels: Tensor) -> float:
    """The function of the kernels; not a number where it is undefined."""
    try:
        return function(*kernels)
    except UndefinedMetricError:
        return float("nan")
