"""How fast does each method learn? Loss and validation score by optimizer step and by second (the paper's Figure 3).

    python -m analyses.convergence --task sst2 --data-dir glue --comparison results/method_comparison

With ``--comparison`` each method has the learning rate that `analyses.method_comparison` chose for it; without it, its
default. The same command resumes an interrupted grid.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from analyses.core.analysis import Analysis, Findings, GridOutput, Runs
from analyses.core.intervals import LOG, mean_interval
from analyses.core.scales import scale_of
from analyses.method_comparison import Config as ComparisonConfig
from analyses.records import Block, Metric, Result, metric_cell, summary_of_blocks
from analyses.subjects.learning_rates import check_origin
from analyses.subjects.training_run import RatedRuns, ScoreCurve, chance_score, method_cells, training_run
from propulsion.data import TaskData
from propulsion.methods import Method, parse_methods

COST = "twenty minutes"

SHARES = (0.9, 0.95)
"""The shares of a method's gain, from its first score to its best, for which the steps to reach them are reported."""
_STEPS = "steps to {:.0%} of its gain"


@dataclass(frozen=True)
class Config(RatedRuns, GridOutput):
    """Options of the analysis."""

    methods: tuple[str, ...] = ComparisonConfig.methods
    """Methods, each NAME or NAME:OPTION=VALUE,OPTION=VALUE."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs."""
    every: int = 10
    """Optimizer steps between evaluations."""


def find(config: Config, runs: Runs) -> Findings | None:
    """Compute the missing cells and summarise all; None if some are still missing."""
    methods = parse_methods(config.methods)
    factors, data = config.factors(methods), config.run.load(config.task)
    check_origin(config.comparison, data, config.run.model_identity)

    def compute(*, method: Method, factor: float, seed: int) -> dict[str, Any]:
        curve = ScoreCurve(config.run, data, lambda step, steps: step % config.every == 0 or step == steps)
        found = training_run(config.run, data, method, seed=seed, rate_multiplier=factor, callbacks=[curve])
        return {name: found[name] for name in ("losses", "trained_parameters")} | {"points": curve.points}

    shared = runs.of(data, config.run.identity(data))
    cells = method_cells(shared, config.task, methods, factors, config.seeds, compute)
    return None if runs.missing else _summarised(config, data, cells)


def _summarised(config: Config, data: TaskData, cells: dict[str, list[dict[str, Any]]]) -> Findings:
    metrics, arrays, curves = [], {}, []
    for text, runs in cells.items():
        scores = np.array([[point["score"] for point in run["points"]] for run in runs])
        steps = [int(point["step"]) for point in runs[0]["points"]]
        arrays |= {f"scores.{text}": scores, f"losses.{text}": np.array([run["losses"] for run in runs])}
        arrays |= {f"seconds.{text}": np.array([[point["seconds"] for point in run["points"]] for run in runs])}
        arrays["steps"] = np.array(steps)
        found = {
            "final score": scores[:, -1].tolist(),
            "mean score over the steps": scores.mean(axis=1).tolist(),
            **{_STEPS.format(share): [steps[first_at(run, share)] for run in scores] for share in SHARES},
        }
        for name, values in found.items():
            unit, scale = ("steps", LOG) if "steps to" in name else ("", scale_of(data.task.metrics[0]))
            metrics.append(Metric(name, *mean_interval(values, scale), unit, "trained", text, ""))
        curves.append({"method": text, "rate_factor": runs[0]["rate_factor"], "seeds": len(runs),
                       "trained_parameters": runs[0]["trained_parameters"]})  # fmt: skip
    return Findings(
        metrics=metrics, tables={"methods": curves}, arrays=arrays, model=config.run.model_identity(),
        dataset={"name": config.task, "metric": data.task.metrics[0], "chance": chance_score(data),
                 "fingerprint": data.fingerprint, "all_rows": data.all_rows},
    )  # fmt: skip


def first_at(scores: np.ndarray, share: float) -> int:
    """Index of the first score that reaches a share of the way from the first score to the best."""
    goal = scores[0] + share * (np.max(scores) - scores[0])
    return int(np.argmax(scores >= goal))


@summary_of_blocks
def summary(result: Result) -> Iterator[Block]:
    """One row for each method."""
    names = list(dict.fromkeys(m.name for m in result.metrics))
    yield [result.dataset["name"], *names, "rate x", "trained"], [
        [row["method"], *(metric_cell(result.metric(name, stage="trained", left=row["method"])) for name in names),
         f"{row['rate_factor']:.3g}", f"{row['trained_parameters']:,}"]
        for row in result.tables["methods"]
    ]  # fmt: skip


ANALYSIS = Analysis(
    "convergence", Config, find, summary,
    least={"every": 1},
    # The method, the seed and the factor of a cell are its own, as are task, rows and model.
    free=("task", "methods", "seeds", "comparison", "run.data_dir", "run.model"),
    about=lambda config: f"intervals: 95 %, Student's over {len(config.seeds)} seeds",
)  # fmt: skip
run = ANALYSIS.run

if __name__ == "__main__":
    ANALYSIS.command(__doc__)
