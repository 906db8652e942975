"""Does every method learn without a search for its learning rate, and how far from the best of a grid does it end?

Every method trains at the automatic rates (`propulsion.training.measured_rates`), at the fixed rates that were the
default before (`propulsion.training.learning_rates`), and at multiples of the automatic rates. A method counts as
learning if the whole interval of its score on the validation rows is above the score of the best single answer.

    python -m analyses.default_rates --data-dir glue --tasks sst2 stsb cola rte --output-dir results/default_rates

The same command resumes an interrupted grid; ``--max-runs 10`` computes ten more cells. The automatic and the fixed
rates of all tasks are computed first, then the multiples in the order of ``--factors``. A result is written as soon as
all automatic and fixed rates are complete; with ``--partial`` it has the tasks and methods for which both are complete.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import tyro

from analyses.core.analysis import Analysis, Findings, GridOutput, Runs
from analyses.records import Block, Metric, Result, number, summary_of_blocks
from analyses.subjects.batch import labels_of
from analyses.subjects.training_run import RunConfig, chance_score, scores, training_run
from propulsion.data import TaskData
from propulsion.errors import Diverged, UserError
from propulsion.methods import Method, parse_methods
from propulsion.training import TrainingOptions

COST = "hours"

AUTO, FIXED = "auto", "fixed"
_KEPT = ("validation_loss", "learning_rates", "trained_parameters", "seconds_per_step")


@dataclass(frozen=True)
class Config(GridOutput):
    """Options of the analysis."""

    tasks: tuple[str, ...] = ("demo",)
    """Classification and regression tasks."""
    # A factory, since the documentation site reads words with a colon in a signature as a reference.
    methods: tuple[str, ...] = field(
        default_factory=lambda: (
            "full", "propulsion", "propulsion:positions=attn", "lora", "ia3", "bitfit", "ln_tuning", "head", "vera",
            "prompt_tuning", "prefix_tuning", "p_tuning", "adalora", "loha",
        )
    )  # fmt: skip
    """Methods, each NAME or NAME:OPTION=VALUE,OPTION=VALUE."""
    factors: tuple[float, ...] = (3.0, 1 / 3, 9.0, 1 / 9, 27.0, 1 / 27)
    """Multiples of the automatic rates in the grid, besides 1, in the order in which they are computed."""
    run: tyro.conf.OmitArgPrefixes[RunConfig] = field(
        default_factory=lambda: RunConfig(
            n_train=2400, n_validation=300,
            training=TrainingOptions(max_steps=150, per_device_train_batch_size=8, max_length=64,
                                    train_sampling_strategy="group_by_length"),
        )
    )  # fmt: skip
    """Options of every run; the learning rates are set by each cell."""
    resamples: int = 1000
    """Bootstrap resamples of the validation rows behind each interval."""
    partial: bool = False
    """Write a result although runs are missing, with the tasks and methods that have both automatic and fixed rates."""

    @property
    def seed(self) -> int:
        """The one seed of the runs."""
        return self.run.training.seed


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        task: Name of the task.
        method: The method as in `Config.methods`.
        factor: Multiple of the automatic rates; None for the fixed rates.
    """

    task: str
    method: str
    factor: float | None

    @property
    def setting(self) -> str:
        """The name of its rates in tables."""
        return FIXED if self.factor is None else AUTO if self.factor == 1 else f"x {self.factor:.3g}"


def cells_of(config: Config) -> Iterator[Cell]:
    """Yield all runs, in the order in which they are computed."""
    for task, method, factor in product(config.tasks, config.methods, (1.0, None)):
        yield Cell(task, method, factor)
    for factor, task, method in product(config.factors, config.tasks, config.methods):
        yield Cell(task, method, factor)


def find(config: Config, runs: Runs) -> Findings | None:
    """Compute the missing cells and summarise all; None if automatic or fixed rates are missing."""
    methods = parse_methods(config.methods)
    data = config.run.load_all(config.tasks)
    cells = {task: runs.of(rows, config.run.identity(rows)) for task, rows in data.items()}
    rows = []
    for cell in cells_of(config):
        label = f"{cell.task}.{cell.method}.{cell.setting}"
        compute = partial(_train, config, data[cell.task])
        found = cells[cell.task].cell(label, compute, method=methods[cell.method], factor=cell.factor)
        if found is not None:
            rows.append(_row(config, cell, data[cell.task], found))
    have = {(row["task"], row["method"], row["setting"]) for row in rows}
    pairs = [(task, text) for task in data for text in methods]
    whole = {pair for pair in pairs if all((*pair, setting) in have for setting in (AUTO, FIXED))}
    if not whole or (len(whole) < len(pairs) and not config.partial):
        return None
    rows = [row for row in rows if (row["task"], row["method"]) in whole]
    return _summarised(config, data, rows, len(runs.missing))


def _check(config: Config) -> None:
    if not config.tasks or 1 in config.factors:
        raise UserError("there must be a task, and factors must be other than 1, which is always computed")


def _train(config: Config, data: TaskData, *, method: Method, factor: float | None) -> dict[str, Any]:
    choice = None if factor is None else AUTO
    rated = replace(config.run.training, learning_rate=choice, head_learning_rate=choice)
    shared = replace(config.run, training=rated)
    try:
        times = 1.0 if factor is None else factor
        found = training_run(shared, data, method, seed=rated.seed, rate_multiplier=times)
    except Diverged as error:
        return {"diverged": str(error)}
    quarter = max(1, len(found["losses"]) // 4)
    return {name: found[name] for name in ("predictions", *_KEPT)} | {
        "diverged": "",
        "first_loss": float(np.mean(found["losses"][:quarter])),
        "last_loss": float(np.mean(found["losses"][-quarter:])),
    }


def _row(config: Config, cell: Cell, data: TaskData, found: Mapping[str, Any]) -> dict[str, Any]:
    same = {"task": cell.task, "method": cell.method, "setting": cell.setting, "factor": cell.factor,
            "chance": chance_score(data)}  # fmt: skip
    if found["diverged"]:
        return same | {"score": None, "low": None, "high": None, "learns": False, "diverged": found["diverged"]}
    value, low, high = _interval(data, np.asarray(found["predictions"]), config.resamples)
    same |= {"score": value, "low": low, "high": high, "learns": low > same["chance"]}
    return same | {name: found[name] for name in (*_KEPT, "first_loss", "last_loss", "diverged")}


def _interval(data: TaskData, predictions: np.ndarray, resamples: int) -> tuple[float, float, float]:
    """The task's first metric with its 95 % bootstrap interval over validation rows; undefined values count as 0."""
    labels, generator = labels_of(data), np.random.default_rng(0)

    def score(rows: np.ndarray) -> float:
        value = next(iter(scores(data.task.name, predictions[rows], labels[rows]).values()))
        return value if np.isfinite(value) else 0.0

    n = len(labels)
    draws = [score(generator.integers(0, n, n)) for _ in range(resamples)]
    low, high = np.quantile(draws, [0.025, 0.975])
    return score(np.arange(n)), float(low), float(high)


def _summarised(config: Config, data: Mapping[str, TaskData], rows: Sequence[dict[str, Any]], missing: int) -> Findings:
    metrics = [
        Metric(data[row["task"]].task.metrics[0], row["score"], row["low"], row["high"], "", row["setting"],
               row["method"], row["task"])
        for row in rows if row["score"] is not None
    ]  # fmt: skip
    return Findings(
        metrics,
        tables={"runs": list(rows), "summary": compared(rows), "missing": [{"cells": missing}]},
        model=config.run.model_identity(),
        dataset={"name": ", ".join(data), "fingerprints": {task: d.fingerprint for task, d in data.items()}},
    )


def compared(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each task and method: scores at fixed and automatic rates, and the best of the computed grid."""
    found = []
    for task, text in dict.fromkeys((row["task"], row["method"]) for row in rows):
        own = {row["setting"]: row for row in rows if (row["task"], row["method"]) == (task, text)}
        grid = [row for row in own.values() if row["setting"] != FIXED]
        best = max(grid, key=lambda row: -math.inf if row["score"] is None else row["score"])
        found.append({
            "task": task, "method": text, "chance": own[AUTO]["chance"],
            FIXED: own[FIXED]["score"], "fixed learns": own[FIXED]["learns"],
            AUTO: own[AUTO]["score"], "auto low": own[AUTO]["low"], "auto high": own[AUTO]["high"],
            "auto learns": own[AUTO]["learns"], "auto rates": own[AUTO].get("learning_rates", {}),
            "best": best["score"], "best setting": best["setting"], "grid points": len(grid),
        })  # fmt: skip
    return found


@summary_of_blocks
def summary(result: Result) -> Iterator[Block]:
    """One table for each task; a star marks scores whose whole interval is above the best single answer."""
    rows = result.tables["summary"]
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in rows if row["task"] == task]
        header = [f"{task} (one answer: {of_task[0]['chance']:.3f})", FIXED, AUTO, "interval", "best of grid",
                  "at", "points", "automatic rates"]  # fmt: skip
        yield header, [_cells(row) for row in of_task]


def _cells(row: Mapping[str, Any]) -> list[str]:
    def shown(name: str) -> str:
        return "diverged" if row[name] is None else f"{row[name]:.3f}{'*' * row[f'{name} learns']}"

    bounds = "" if row["auto low"] is None else f"{row['auto low']:.3f} to {row['auto high']:.3f}"
    best = "diverged" if row["best"] is None else f"{row['best']:.3f}"
    rates = ", ".join(f"{role} {number(rate)}" for role, rate in row["auto rates"].items())
    return [row["method"], shown(FIXED), shown(AUTO), bounds, best, row["best setting"], str(row["grid points"]), rates]


ANALYSIS = Analysis(
    "default_rates", Config, find, summary,
    least={"resamples": 1},
    above={"factors": 0},
    check=_check,
    # The method and the factor of a cell are its own, as are task, rows and model.
    free=("tasks", "methods", "factors", "resamples", "partial", "run.data_dir", "run.model"),
    draws=False,
)  # fmt: skip
run = ANALYSIS.run

if __name__ == "__main__":
    ANALYSIS.command(__doc__)
