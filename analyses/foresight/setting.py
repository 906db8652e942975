"""The cells of one setting: final scores of all candidates, and everything that is known of them before.

A setting is a task, a number of training rows and a seed, which draws the rows, the head, their order and the methods'
random values. Its cells are:

- for each candidate the final run on all training rows, scored on the validation rows;
- for each candidate runs of 2, 5 and 10 % of the steps on three quarters of the training rows, scored on the other
  quarter, each with a schedule of its own, at the rates that the run of 5 % measured;
- the kernels before training, at a head trained on frozen features and at the random head;
- the further runs of successive halving with 5 and 15 % of the steps of all final runs;
- in some settings, the final runs at multiples of the automatic rates, and those that choose among them on held-out
  training rows.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from analyses.choose import halving
from analyses.choose.evidence import kernels_of
from analyses.choose.halving import Cost
from analyses.choose.trial import score_and_loss, trial
from analyses.core.cells import ARRAYS, Cells
from analyses.subjects.training_run import RunConfig, training_run, tuning_split
from propulsion.data import TaskData
from propulsion.errors import Diverged
from propulsion.methods import Method

EARLY = (0.02, 0.05, 0.10)
"""Shares of the steps after which candidates are looked at."""
FIRST = 0.05
"""The share whose run measures rates, gradients, features and the kernel after training."""
BUDGETS = (0.05, 0.15)
"""Shares of the steps of all final runs that the command may take."""
_KEPT = ("scores", "predictions", "losses", "trained_parameters", "learning_rates", "seconds_per_step")

Trial = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What candidates are compared in.

    Attributes:
        task: Name of the task.
        rows: Number of training rows that was asked for.
        seed: Seed of all random choices.
    """

    task: str
    rows: int
    seed: int

    def __str__(self) -> str:
        return f"{self.task}.{self.rows} rows.seed{self.seed}"


@dataclass(frozen=True)
class Measured:
    """A complete setting.

    Attributes:
        setting: Which it is.
        part: The training rows, divided into those of early runs and held-out ones.
        final: By candidate, its final run at the automatic rates.
        early: By share of the steps and candidate, its early run.
        kernels: Kernels before training, at a trained head.
        random_head: The same at the random head.
        orders: By budget, the candidates that the command tried, from best to worst.
        factors: By multiple of the rates, other than 1, and candidate, its final run and the run that chooses among the
            multiples; empty unless the grid is complete here. Its entry 1 has the choosing runs at the automatic rates.
    """

    setting: Setting
    part: TaskData
    final: Mapping[str, Trial]
    early: Mapping[float, Mapping[str, Trial]]
    kernels: Mapping[str, np.ndarray]
    random_head: Mapping[str, np.ndarray]
    orders: Mapping[float, Sequence[str]]
    factors: Mapping[float, Mapping[str, tuple[Trial, Trial]]] = field(default_factory=dict)


class Missing(Exception):
    """A cell of a setting is not computed yet."""


@dataclass(frozen=True)
class SettingCells:
    """Computes the cells of one setting, or reads them.

    Attributes:
        cells: Where they are kept.
        setting: The setting.
        run: Options of the runs.
        data: The rows of the setting.
        methods: The candidates.
    """

    cells: Cells
    setting: Setting
    run: RunConfig
    data: TaskData
    methods: Mapping[str, Method]

    def measured(self, n_examples: int, factors: Sequence[float]) -> Measured | None:
        """All of a setting; None if cells are missing.

        Args:
            n_examples: Number of rows of the kernels.
            factors: Multiples of the automatic rates of the grid; none for no grid here.
        """
        part = tuning_split(self.data)
        n = min(n_examples, len(part.train) // 2)
        steps = self.run.training.max_steps
        try:
            first = {name: self._trial(part, name, steps_of(FIRST, steps), None, n) for name in self.methods}
            early = {share: first if share == FIRST else self._early(part, first, share) for share in EARLY}
            orders = {share: self._order(part, first, share) for share in BUDGETS}
            kernels, random_head = (self._kernels(part, n, probed) for probed in (True, False))
            final = {name: one if one["failed"] else self._final(self.data, name, 1.0) for name, one in first.items()}
        except Missing:
            return None
        measured = Measured(self.setting, part, final, early, kernels, random_head, orders)
        try:
            return replace(measured, factors=self._grid(part, final, factors))
        except Missing:
            return measured

    def _cell(self, name: str, compute: Any, **own: Any) -> dict[str, Any]:
        found = self.cells.cell(f"{self.setting}.{name}", compute, seed=self.setting.seed, **own)
        if found is None:
            raise Missing(name)
        return found

    def _trial(
        self, part: TaskData, name: str, steps: int, rates: Mapping[str, float] | None, kernel: int = 0
    ) -> Trial:
        """A trial of a candidate; without rates it measures them, and what else a first trial measures."""
        compute = partial(trial, self.run, part)
        return self._cell(f"{name}, {steps} steps", compute, method=self.methods[name], steps=steps, rates=rates,
                          first=rates is None, kernel=kernel)  # fmt: skip

    def _early(self, part: TaskData, first: Mapping[str, Trial], share: float) -> dict[str, Trial]:
        steps = steps_of(share, self.run.training.max_steps)
        return {name: one if one["failed"] else self._trial(part, name, steps, one["learning_rates"])
                for name, one in first.items()}  # fmt: skip

    def _order(self, part: TaskData, first: Mapping[str, Trial], share: float) -> list[str]:
        """The candidates that successive halving tries within a share of the steps of all final runs, best first.

        Steps are counted, and neither loading nor measuring rates, which the command does in every way of choosing.
        """
        most = self.run.training.max_steps
        names = [name for name in self.methods if not first[name]["failed"]]
        budget = {"seconds": share * len(names) * most, "spent": 0.0, "most": most}
        cost = Cost(0.0, 1.0)
        if not names or share * len(names) * most * (1 - halving.FOR_PREDICTORS) < least_steps(len(names), most):
            return []
        names = names[: halving.affordable(len(names), cost, **budget)]
        ranked: list[str] = []
        for rung in halving.plan(len(names), cost, **budget):
            going = names[: rung.candidates]
            if rung.steps == steps_of(FIRST, most):
                tried = {name: first[name] for name in going}
            else:
                tried = {name: self._trial(part, name, rung.steps, first[name]["learning_rates"]) for name in going}
            tried = {name: one for name, one in tried.items() if not one["failed"]}
            best = halving.best({name: score_and_loss(one) for name, one in tried.items()}, len(tried))
            ranked = [*best, *(name for name in ranked if name not in best)]
            names = best
        return ranked

    def _kernels(self, part: TaskData, n: int, probed: bool) -> dict[str, np.ndarray]:
        def compute(*, candidates: list[str], n: int, probed: bool, seed: int) -> dict[str, Any]:
            methods = {name: self.methods[name] for name in candidates}
            return {ARRAYS: kernels_of(self.run, part, methods, n, seed, probed=probed)}

        if n < 2:
            return {}
        name = f"kernels at {'a trained' if probed else 'the random'} head"
        return self._cell(name, compute, candidates=list(self.methods), n=n, probed=probed)[ARRAYS]

    def _final(self, data: TaskData, name: str, factor: float) -> Trial:
        """The run of all steps; on the tuning split, it chooses among multiples of the rates."""
        where = "final" if data is self.data else "choosing"
        compute = partial(_trained, self.run, data)
        return self._cell(f"{name}.{where} x{factor:.3g}", compute, method=self.methods[name], factor=factor,
                          where=where)  # fmt: skip

    def _grid(
        self, part: TaskData, final: Mapping[str, Trial], factors: Iterable[float]
    ) -> dict[float, dict[str, tuple[Trial, Trial]]]:
        factors = tuple(factors)
        if not factors:
            return {}
        names = [name for name, one in final.items() if not one["failed"]]
        known = {1.0: {name: (final[name], self._final(part, name, 1.0)) for name in names}}
        return known | {
            factor: {name: (self._final(self.data, name, factor), self._final(part, name, factor)) for name in names}
            for factor in factors
        }


def steps_of(share: float, most: int) -> int:
    """A share of the steps of a final run, at least one."""
    return max(1, round(share * most))


def least_steps(candidates: int, most: int) -> float:
    """Steps of the shortest rounds of two candidates, or of the only one."""
    count = min(candidates, halving.LAST)
    return halving.seconds_of(halving.rungs(count, min(halving.FEWEST_STEPS, most), most), Cost(0.0, 1.0))


def _trained(run: RunConfig, data: TaskData, *, method: Method, factor: float, where: str, seed: int) -> Trial:
    try:
        found = training_run(run, data, method, seed=seed, rate_multiplier=factor)
    except Diverged as error:
        return {"failed": str(error)}
    return {"failed": "", "validation_loss": found["validation_loss"]} | {name: found[name] for name in _KEPT}


def final_score(run: Trial) -> float:
    """The first score of a final run; 0 if it is undefined, as of constant predictions, or the run diverged."""
    value = None if run["failed"] else next(iter(run["scores"].values()))
    return 0.0 if value is None or not math.isfinite(value) else float(value)


def searched_scores(measured: Measured) -> dict[str, float] | None:
    """By candidate, the final score at the multiple of the rates that is best on held-out training rows; None without
    a grid."""
    if not measured.factors:
        return None
    found = {}
    for name, final in measured.final.items():
        grid = {factor: each[name] for factor, each in measured.factors.items() if name in each}
        runs = grid or {1.0: (final, final)}
        known = {str(f): score_and_loss(chosen) for f, (_, chosen) in runs.items() if not chosen["failed"]}
        best = float(halving.best(known, 1)[0]) if known else 1.0
        found[name] = final_score(runs[best][0])
    return found
