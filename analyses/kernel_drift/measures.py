"""How far kernels, Jacobians and outputs changed, from the arrays that `Probe` kept: values with intervals.

Every quantity is computed in each run and averaged over the seeds. It has two intervals: Student's
over the seeds, on its scale (`analyses.core.scales`), and a bootstrap's over the held-out examples, with the same
resamples for all seeds and without resampling seeds.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ntk
from analyses.core.bootstrap import bootstrap_interval, drawn_interval
from analyses.core.intervals import IDENTITY, LOG, Scale
from analyses.core.scales import bounded_mean, scale_of, within
from analyses.records import STAGES, Metric
from ntk.dynamics import linearization_error, relative_drift

Cell = dict[str, Any]
Cells = dict[str, list[Cell]]
Ends = tuple[float, float]

PERMUTED = "examples permuted"
OTHER_HEAD = "another seed's head"
OTHER_EXAMPLE = "another example"

_NONE: Ends = (math.nan, math.nan)

DRIFTS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "relative_kernel_drift": relative_drift,
    "kernel_alignment_with_start": ntk.kernel_alignment,
    "kernel_cka_with_start": ntk.cka,
    "kernel_trace_ratio": ntk.trace_ratio,
}
"""Metrics of a method's kernel at a checkpoint against its kernel at initialisation."""

JACOBIANS = {"relative_jacobian_drift": "moved", "relative_jacobian_drift_same_head": "moved_same_head"}
"""Relative changes of the Jacobian since the start, with the field of `JacobianDrift` that holds the squared norm."""

PAIRS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "cka": ntk.cka,
    "alignment": ntk.kernel_alignment,
    "relative_distance_best_scale": lambda a, b: ntk.kernel_distance(a, b, scaled=True),
}
"""Metrics of the kernels of two methods at one step."""


@dataclass(frozen=True)
class Estimate:
    """A quantity of one method or pair at one step.

    Attributes:
        by_seed: Its value in each run.
        examples: Its bootstrap interval over examples; not a number if none was computed.
        scale: The scale of its intervals.
    """

    by_seed: tuple[float, ...]
    examples: Ends = _NONE
    scale: Scale = IDENTITY

    @property
    def value(self) -> float:
        """Mean over the seeds."""
        return float(np.mean(self.by_seed))

    @property
    def seeds(self) -> Ends:
        """Student's interval over the seeds; not a number for a single seed."""
        return bounded_mean(self.by_seed, self.scale)[1:]

    @property
    def ends(self) -> Ends:
        """The interval over seeds, or over examples if there is a single run."""
        return self.seeds if len(self.by_seed) > 1 else self.examples

    def row(self) -> dict[str, Any]:
        """The estimate as a row of a table."""
        both = {"seeds": self.seeds, "examples": self.examples}
        ends = {f"{name}_{end}": v for name, found in both.items() for end, v in zip(("low", "high"), found)}
        return {"value": self.value, **ends, "by_seed": list(self.by_seed)}

    def metric(self, name: str, stage: str, left: str, right: str = "") -> Metric:
        """The estimate as a metric of a result."""
        return Metric(name, self.value, *self.ends, "", stage, left, right)


# --- estimates ------------------------------------------------------------------------------------------------------


def of_kernels(
    metric: Callable[[Tensor, Tensor], float], runs: Sequence[tuple[Tensor, Tensor]], scale: Scale, resamples: int = 0
) -> Estimate:
    """Estimate of a metric of two kernels ``(n, n)`` in each run; `resamples` add an interval over examples."""

    def mean(*flat: Tensor) -> float:
        return float(np.mean([metric(*pair) for pair in zip(flat[::2], flat[1::2], strict=True)]))

    found = _estimate((_or_nan(metric, *pair) for pair in runs), scale)
    flat = [kernel for pair in runs for kernel in pair]
    if not resamples:
        return found
    return replace(found, examples=bootstrap_interval(mean, flat, resamples=resamples, seed=0, scale=scale)[1:])


def of_rows(
    metric: Callable[..., float], runs: Sequence[tuple[Tensor, ...]], scale: Scale, resamples: int = 0
) -> Estimate:
    """Estimate of a metric of tensors with one row for each example, in each run; the bootstrap draws rows."""
    found = _estimate((_or_nan(metric, *rows) for rows in runs), scale)
    n, generator = len(runs[0][0]), np.random.default_rng(0)
    drawn = []
    for _ in range(resamples):
        index = torch.from_numpy(generator.integers(0, n, size=n))
        drawn.append(np.mean([_or_nan(metric, *(t[index] for t in rows)) for rows in runs]))
    return replace(found, examples=drawn_interval(found.value, np.array(drawn), scale)[1:])


def _estimate(values: Iterable[float], scale: Scale) -> Estimate:
    return Estimate(tuple(within(list(values), scale)), scale=scale)


def relative_norm(moved: Tensor, start: Tensor) -> float:
    """sqrt(sum of `moved` / sum of `start`), both squared norms ``(m, ...)``: of changes, and of initial values.

    Raises:
        UndefinedMetricError: The initial values are all 0.
    """
    return _ratio(moved.sum(), start.sum(), "the initial values are 0") ** 0.5


def same_prediction(outputs: Tensor, linearized: Tensor, _: Tensor) -> float:
    """Share of examples for which network and linearisation choose the same class.

    Raises:
        ValueError: An output is not finite, and so chooses no class.
    """
    for name, values in (("the network", outputs), ("its linearisation", linearized)):
        if not values.isfinite().all():
            raise ValueError(f"outputs of {name} are not finite: they choose no class")
    return float((outputs.argmax(1) == linearized.argmax(1)).double().mean())


def linear_share(outputs: Tensor, linearized: Tensor, initial: Tensor) -> float:
    """Norm of the linearised change of the outputs relative to the true change, |f_lin - f_0| / |f_t - f_0|.

    Raises:
        UndefinedMetricError: The outputs did not change.
    """
    return _ratio((linearized - initial).norm(), (outputs - initial).norm(), "the outputs did not change")


def _ratio(above: Tensor, below: Tensor, why: str) -> float:
    if below == 0:
        raise ntk.UndefinedMetricError(f"the ratio is undefined: {why}")
    return float(above / below)


def _or_nan(metric: Callable[..., float], *arguments: Tensor) -> float:
    """The metric; NaN where it is undefined, for example if outputs did not change or a kernel is constant."""
    try:
        return metric(*arguments)
    except (ntk.UndefinedMetricError, ValueError) as error:
        if isinstance(error, ntk.UndefinedMetricError) or "did not move" in str(error):
            return math.nan
        raise


OUTPUTS: dict[str, Callable[..., float]] = {
    "linearisation_error": linearization_error,
    "linearised_movement": linear_share,
    "linearised_agreement": same_prediction,
}
"""Metrics of outputs and their linearisation at a checkpoint; the last one is of classifications alone."""


# --- one method -----------------------------------------------------------------------------------------------------


def method_estimates(cells: Sequence[Cell], place: int, resamples: int) -> Iterator[tuple[str, Estimate]]:
    """Yield every quantity of one method at the checkpoint of index `place`, by name."""
    for name, metric in DRIFTS.items():
        yield name, of_kernels(metric, _now_and_start(cells, place), scale_of(name), resamples)
    if place == 0:
        for name in JACOBIANS:
            yield name, Estimate((0.0,) * len(cells), (0.0, 0.0), scale_of(name))
    else:
        norms = [jacobian_norms(cell, place) for cell in cells]
        for name, moved in JACOBIANS.items():
            yield name, of_rows(relative_norm, [(n[moved], n["start"]) for n in norms], scale_of(name), resamples)
        movements = [movement(cell, place) for cell in cells]
        for name, metric in OUTPUTS.items():
            if metric is not same_prediction or movements[0][0].shape[1] > 1:
                yield name, of_rows(metric, movements, scale_of(name), resamples)
    for name in ("parameter_drift", "head_drift", "score"):
        found = (cell["points"][place][name] for cell in cells)
        scale = scale_of(next(iter(cells[0]["scores"])) if name == "score" else name)
        yield name, _estimate((math.nan if value is None else float(value) for value in found), scale)


def method_nulls(cells: Sequence[Cell], draws: int) -> Iterator[tuple[str, str, Estimate]]:
    """Yield the same quantities after training for unrelated kernels, Jacobians or outputs: (name, null, value).

    Pairs of seeds share runs, so that intervals over pairs are approximate.
    """
    finals = _now_and_start(cells, -1)
    for name, metric in list(DRIFTS.items())[:3]:
        yield f"null_{name}", PERMUTED, averaged(metric, finals, scale_of(name), draws)
        if len(cells) > 1:
            starts = [start for _, start in finals]
            others = list(pairwise([*starts, starts[0]])) if len(cells) > 2 else [(starts[0], starts[1])]
            yield f"null_{name}", OTHER_HEAD, of_kernels(metric, others, scale_of(name))
    norms = [jacobian_norms(cell, -1) for cell in cells]
    # Changes are relative to the norm of the Jacobian that is compared with, that of the previous example.
    shifted = [(n["shifted"], n["start"].roll(1, 0)) for n in norms]
    yield "null_relative_jacobian_drift", OTHER_EXAMPLE, of_rows(relative_norm, shifted, LOG)
    wrong = [
        (outputs, initial + (linearized - initial)[order(len(outputs), 0)], initial)
        for outputs, linearized, initial in (movement(cell, -1) for cell in cells)
    ]
    yield "null_linearisation_error", PERMUTED, of_rows(linearization_error, wrong, LOG)


def averaged(
    metric: Callable[[Tensor, Tensor], float], runs: Sequence[tuple[Tensor, Tensor]], scale: Scale, draws: int
) -> Estimate:
    """A metric with the examples of the first kernel permuted; the value of a run is the mean over the draws."""
    orders = [order(len(runs[0][0]), draw) for draw in range(draws)]
    values = (float(np.mean([_or_nan(metric, now[p][:, p], start) for p in orders])) for now, start in runs)
    return _estimate(values, scale)


def order(n: int, seed: int) -> Tensor:
    """A random order of n examples."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


# --- two methods ----------------------------------------------------------------------------------------------------


def pair_estimates(cells: Cells, place: int, resamples: int) -> Iterator[tuple[str, str, str, Estimate]]:
    """Yield every metric of every two methods' kernels at one checkpoint: (name, left, right, value)."""
    for left, right in combinations(cells, 2):
        runs = _kernels_of(cells, left, right, place)
        for name, metric in PAIRS.items():
            yield name, left, right, of_kernels(metric, runs, scale_of(name), resamples)


def pair_nulls(cells: Cells, place: int, draws: int) -> Iterator[tuple[str, str, str, Estimate]]:
    """Yield the same metrics with the examples of the right kernel permuted."""
    for left, right in combinations(cells, 2):
        runs = [(b, a) for a, b in _kernels_of(cells, left, right, place)]
        for name, metric in PAIRS.items():
            found = averaged(lambda b, a, metric=metric: metric(a, b), runs, scale_of(name), draws)
            yield f"null_{name}", left, f"{right}, {PERMUTED}", found


def _kernels_of(cells: Cells, left: str, right: str, place: int) -> list[tuple[Tensor, Tensor]]:
    both = zip(cells[left], cells[right], strict=True)
    return [(tensor(a, "kernels")[place], tensor(b, "kernels")[place]) for a, b in both]


# --- reading a cell -------------------------------------------------------------------------------------------------


def tensor(cell: Cell, name: str) -> Tensor:
    """An array of a cell as a tensor."""
    return torch.from_numpy(np.asarray(cell["arrays"][name]))


def _now_and_start(cells: Sequence[Cell], place: int) -> list[tuple[Tensor, Tensor]]:
    """The kernels ``(n, n)`` of each run at a checkpoint and at the start."""
    return [(tensor(cell, "kernels")[place], tensor(cell, "kernels")[0]) for cell in cells]


def movement(cell: Cell, place: int) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs ``(n, c)`` at a checkpoint, those of the linearised network there, and those at the start."""
    return tensor(cell, "outputs")[place], tensor(cell, "linearized")[place], tensor(cell, "outputs")[0]


def jacobian_norms(cell: Cell, place: int) -> dict[str, Tensor]:
    """Squared norms ``(m, places)`` at a checkpoint other than the start, by the fields of `JacobianDrift`."""
    index = place - 1 if place > 0 else place
    return {name: tensor(cell, name)[index].double().T for name in ("moved", "moved_same_head", "start", "shifted")}


def stage_metrics(cells: Cells, resamples: int, draws: int) -> list[Metric]:
    """The metrics of a result: every quantity before and after training, with its nulls."""
    metrics = []
    for stage, place in zip(STAGES, (0, len(next(iter(cells.values()))[0]["points"]) - 1)):
        for text, runs in cells.items():
            metrics += [e.metric(name, stage, text) for name, e in method_estimates(runs, place, resamples)]
            if place:
                metrics += [e.metric(name, stage, text, right) for name, right, e in method_nulls(runs, draws)]
        for found in (pair_estimates(cells, place, resamples), pair_nulls(cells, place, draws)):
            metrics += [e.metric(name, stage, left, right) for name, left, right, e in found]
    return metrics
