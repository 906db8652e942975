"""Which method trains best? Methods of fine-tuning on several tasks and seeds, each at its own best learning rate.

All methods train the same pre-trained model with the same head on the same rows in the same order. The learning rate of
a method on a task is its default (`propulsion.training.learning_rates`) times a factor. Trial runs choose the factor by
a part of the training rows that they do not train on: three factors first, then further ones as long as the best is the
smallest or the largest, up to a limit that is the same for all methods. By default the lowest held-out loss decides,
since scores such as accuracy tie where little is learnt, and noise would decide. ``--chosen-by score`` is for tasks on
which every method that fits its training rows raises the held-out loss, so that the loss would choose a rate at which
nothing is learnt. The validation rows are not used for this choice. With ``--searched`` only the named methods have
trial runs, and the others train at their defaults.

Every run is scored on the validation rows at its end and after two thirds of its steps, so that the result says whether
training had converged. Differences between methods are paired: they are taken within each seed and each row.

    python -m analyses.method_comparison --data-dir glue --tasks sst2 rte cola stsb --output-dir results/comparison

The same command resumes an interrupted grid; ``--max-runs 10`` computes ten more cells and stops.
"""

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import tyro

from analyses.core.analysis import Analysis, Findings, GridOutput, Runs
from analyses.core.cells import Cells
from analyses.core.intervals import clipped, mean_interval
from analyses.core.scales import limits, scale_of
from analyses.records import Block, Metric, Result, format_table, load_result, metric_cell, number, summary_of_blocks
from analyses.subjects.batch import labels_of
from analyses.subjects.learning_rates import check_origin, factors_of, of_methods, trained_factor
from analyses.subjects.paired_scores import corrected, score_metrics
from analyses.subjects.training_run import RunConfig, ScoreCurve, method_cells, training_run, tuning_split
from propulsion.data import TaskData
from propulsion.errors import Diverged, UserError, did_you_mean
from propulsion.methods import Method, parse_methods

COST = "an hour"

REFERENCE = "full"
FACTOR = 3.0  # Ratio of neighbouring learning rates.
EARLIER = 2 / 3
"""Share of the steps after which the validation rows are scored as well."""
CHANGE = "change over the last third"
"""Name of the metric that is the mean over seeds of the final score minus the score after `EARLIER` of the steps."""


@dataclass(frozen=True)
class Config(GridOutput):
    """Options of the analysis."""

    tasks: tuple[str, ...] = ("demo",)
    """Classification and regression tasks."""
    methods: tuple[str, ...] = (
        "full", "propulsion:positions=all", "propulsion:positions=attn", "lora", "ia3", "bitfit", "head",
    )  # fmt: skip
    """Methods, each NAME or NAME:OPTION=VALUE,OPTION=VALUE; the others are compared with "full"."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the head, the data order, dropout and the methods' own random draws."""
    run: tyro.conf.OmitArgPrefixes[RunConfig] = field(default_factory=RunConfig)
    """Options of every run."""
    rates_from: Path | None = None
    """Earlier result of this analysis: use the learning rates it chose on the same tasks, and try no others."""
    chosen_by: Literal["loss", "score"] = "loss"
    """Measure on held-out rows that chooses the learning rate; with rates_from, "score" chooses among its trials."""
    searched: tuple[str, ...] | None = None
    """Methods whose learning rate trial runs choose, as in methods; the others train at their default rate. By default
    all methods."""
    tuning_steps: int = 50
    """Optimizer steps of the trial runs that choose learning rates, the same for all methods."""
    rate_extensions: int = 3
    """Learning rates that may be tried beyond the first three, as long as the best is at the edge."""
    partial: bool = False
    """Write a result although runs are missing, with the tasks that are complete for at least one seed."""


class Trial(NamedTuple):
    """Loss and first metric of a trial run on the held-out training rows; None if it diverged or is undefined."""

    loss: float | None
    score: float | None


@dataclass(frozen=True)
class Comparison:
    """The complete cells of one task: for each method its chosen factor, its trials and its runs."""

    task: str
    labels: np.ndarray
    factors: dict[str, float]
    tried: dict[str, dict[float, Trial]]
    runs: dict[str, list[dict[str, Any]]]


def find(config: Config, runs: Runs) -> Findings | None:
    """Compute the missing cells and summarise the tasks that are complete for at least one seed."""
    methods = parse_methods(config.methods)
    compared, sources = [], {}
    for task, data in config.run.load_all(config.tasks).items():
        check_origin(config.rates_from, data, config.run.model_identity)
        sources[task] = {"source": data.source.rsplit("/", 1)[-1], "fingerprint": data.fingerprint,
                         "all_rows": data.all_rows}  # fmt: skip
        compared += _task(config, runs.of(data, config.run.identity(data)), data, methods)
    if not compared or (runs.missing and not config.partial):
        return None
    return _summarised(config, compared, sources)


def _check(config: Config) -> None:
    if not config.tasks:
        raise UserError("there must be a task")
    for text in config.searched or ():
        if text not in config.methods:
            close = did_you_mean(text, config.methods)
            raise UserError(f"searched names {text!r}{close}, which is none of the methods")


def _task(config: Config, cells: Cells, data: TaskData, methods: dict[str, Method]) -> list[Comparison]:
    """Tune every method, then train it for each seed; empty if a cell of the first seed is missing."""
    name = data.task.name
    factors, tried = _chosen(config, cells, data, methods)
    if factors.keys() != methods.keys():
        return []
    runs: dict[str, list[dict[str, Any]]] = {text: [] for text in methods}

    def compute(*, method: Method, factor: float, seed: int) -> dict[str, Any]:
        earlier = ScoreCurve(config.run, data, lambda step, steps: step == round(EARLIER * steps))
        found = training_run(config.run, data, method, seed=seed, rate_multiplier=factor, callbacks=[earlier])
        return found | {"earlier_score": earlier.points[0]["score"]}

    for seed in config.seeds:
        found = method_cells(cells, name, methods, factors, [seed], compute)
        if not all(found.values()):
            break
        for text, of_seed in found.items():
            runs[text] += of_seed
    if not runs[config.methods[0]]:
        return []
    return [Comparison(name, labels_of(data), factors, tried, runs)]


def _chosen(
    config: Config, cells: Cells, data: TaskData, methods: dict[str, Method]
) -> tuple[dict[str, float], dict[str, dict[float, Trial]]]:
    """The factor of every method whose trials are complete, and the trials of every method by factor."""
    if config.rates_from is None:
        searched = methods if config.searched is None else config.searched
        found = {text: _tune(config, cells, data, text, methods[text]) for text in methods if text in searched}
        chosen = {text: 1.0 for text in methods if text not in searched}
        chosen |= {text: best_factor(trials, config.chosen_by) for text, trials in found.items() if trials}
        return chosen, {text: found.get(text, {}) for text in methods}
    elif config.chosen_by == "loss":
        return factors_of(methods, config.rates_from, data.task.name), {t: {} for t in methods}
    else:
        tried = of_methods(methods, tried_rates(config.rates_from, data.task.name), f"{config.rates_from}")
    return {text: best_factor(found, config.chosen_by) for text, found in tried.items() if found}, tried


def tried_rates(comparison: Path, task: str) -> dict[str, dict[float, Trial]]:
    """Trials of an earlier result on a task, by method and by factor on the method's default rate.

    Raises:
        UserError: The folder holds no such result, or the result took its rates from another.
    """
    result = load_result(comparison, analysis="method_comparison")
    rows = result.tables["tuning"]
    if not rows:
        raise UserError(f"{comparison} tried no learning rates itself: name the result that it took them from")
    common = result.config["run"]["training"].get("rate_multiplier", 1.0)
    tried: dict[str, dict[float, Trial]] = {}
    for row in rows:
        if row["task"] == task:
            tried.setdefault(row["method"], {})[row["factor"] * common] = Trial(row["loss"], row["score"])
    return tried


def _tune(config: Config, cells: Cells, data: TaskData, text: str, method: Method) -> dict[float, Trial]:
    """Trials of one method by factor; empty if a cell is missing."""
    part = tuning_split(data)
    shorter = replace(config.run, training=replace(config.run.training, max_steps=config.tuning_steps))

    def compute(*, tuned: Method, factor: float) -> dict[str, float | None]:
        try:
            found = training_run(shorter, part, tuned, seed=0, rate_multiplier=factor)
        except Diverged:
            return {"loss": None, "score": None}
        return {"loss": found["validation_loss"], "score": next(iter(found["scores"].values()))}

    found: dict[float, Trial] = {}
    pending = [1 / FACTOR, 1.0, FACTOR]
    for extension in range(config.rate_extensions + 1):
        for factor in pending:
            cell = cells.cell(f"{data.task.name}.{text}.tuning{factor:.3g}", compute, tuned=method, factor=factor)
            if cell is None:
                return {}
            found[factor] = Trial(cell["loss"], cell["score"])
        best = best_factor(found, config.chosen_by)
        edges = {min(found): min(found) / FACTOR, max(found): max(found) * FACTOR}
        if best not in edges or extension == config.rate_extensions:
            break
        pending = [edges[best]]
    return found


def best_factor(tried: dict[float, Trial], chosen_by: str) -> float:
    """The factor of the lowest held-out loss, or of the highest score and then the lowest loss.

    A run that diverged, or whose score is undefined, ranks below all others.
    """

    def badness(factor: float) -> tuple[float, ...]:
        loss, score = (math.inf if value is None else value for value in (tried[factor].loss, tried[factor].score))
        return (loss,) if chosen_by == "loss" else (-score if math.isfinite(score) else math.inf, loss)

    return min(tried, key=badness)


# --- summary --------------------------------------------------------------------------------------------------------


_KEPT = ("seed", "trained_parameters", "seconds_per_step", "peak_bytes", "learning_rates", "earlier_score")
"""What the table of runs holds of a run, beside its scores."""


def _summarised(config: Config, compared: Iterable[Comparison], sources: dict[str, Any]) -> Findings:
    metrics, comparisons, summary, runs, tuning, arrays = [], [], [], [], [], {}
    for found in compared:
        scored, differences = comparison_metrics(found)
        metrics += [*scored, *changes(found)]
        comparisons += differences
        arrays[f"labels.{found.task}"] = found.labels
        for text, of_method in found.runs.items():
            summary.append(_summary_row(found, text))
            for entry in of_method:
                arrays[f"predictions.{found.task}.{text}.{entry['seed']}"] = np.asarray(entry["predictions"])
                arrays[f"losses.{found.task}.{text}.{entry['seed']}"] = np.asarray(entry["losses"])
                runs.append({"task": found.task, "method": text} | {k: entry.get(k) for k in _KEPT} | entry["scores"])
            tuning += [
                {"task": found.task, "method": text, "factor": factor} | trial._asdict()
                for factor, trial in found.tried[text].items()
            ]
    return Findings(
        metrics,
        tables={"summary": summary, "runs": runs, "tuning": tuning, "comparisons": comparisons},
        arrays=arrays,
        model=config.run.model_identity(),
        dataset={"name": ", ".join(sources), "tasks": sources},
    )


def _summary_row(found: Comparison, text: str) -> dict[str, Any]:
    of_method = found.runs[text]
    tried, factor = found.tried[text], found.factors[text]
    return {
        "task": found.task,
        "method": text,
        "seeds": len(of_method),
        "trained_parameters": of_method[0]["trained_parameters"],
        "rate_factor": factor,
        "rate_at_edge": bool(tried) and factor in (min(tried), max(tried)),
        "seconds_per_step": statistics.median(entry["seconds_per_step"] for entry in of_method),
        "peak_bytes": max(entry["peak_bytes"] for entry in of_method),
        "last_losses": statistics.mean(float(np.mean(entry["losses"][-20:])) for entry in of_method),
    }


def comparison_metrics(found: Comparison) -> tuple[list[Metric], list[dict[str, Any]]]:
    """Every method's scores and their paired differences, as `analyses.subjects.paired_scores.score_metrics`."""
    predictions = {text: np.stack([run["predictions"] for run in runs]) for text, runs in found.runs.items()}
    return score_metrics(found.task, predictions, found.labels, REFERENCE)


def changes(found: Comparison) -> list[Metric]:
    """By method, the mean over seeds of the final score minus the earlier one, where both are known."""
    metrics = []
    for text, runs in found.runs.items():
        if all(run.get("earlier_score") is not None for run in runs):
            change = [next(iter(run["scores"].values())) - run["earlier_score"] for run in runs]
            ends = limits(scale_of(next(iter(runs[0]["scores"]))))
            interval = clipped(mean_interval(change), *ends)
            metrics.append(Metric(CHANGE, *interval, "", f"{found.task}, {CHANGE}", text, ""))
    return metrics


@summary_of_blocks
def summary(result: Result) -> Iterator[Block]:
    """One table for each task: score, difference from full fine-tuning, parameters, learning rates, time, memory."""
    for task in dict.fromkeys(row["task"] for row in result.tables["summary"]):
        names = list(dict.fromkeys(m.name for m in result.metrics if m.stage == task))
        header = [task, *names, f"{names[0]} - {REFERENCE}", "after Holm", CHANGE, "trained", "rate x", "s/step",
                  "peak MB", "last loss"]  # fmt: skip
        yield header, [_cells(result, row, names) for row in result.tables["summary"] if row["task"] == task]


def trials(result: Result) -> str:
    """Markdown tables of every task's trials: held-out loss and score of every factor, the chosen one in bold."""
    blocks = []
    for task in dict.fromkeys(row["task"] for row in result.tables["tuning"]):
        tried = {(row["method"], row["factor"]): row for row in result.tables["tuning"] if row["task"] == task}
        factors = sorted({factor for _, factor in tried})
        rows = [
            [row["method"], *(_trial(tried.get((row["method"], f)), f == row["rate_factor"]) for f in factors)]
            for row in result.tables["summary"] if row["task"] == task
        ]  # fmt: skip
        header = [f"{task}: held-out loss, score", *(f"x {factor:.3g}" for factor in factors)]
        blocks.append(format_table(header, rows, markdown=True))
    return "\n\n".join(blocks)


def _trial(row: Mapping[str, Any] | None, chosen: bool) -> str:
    if row is None:
        return ""
    if row["loss"] is None:
        return "diverged"
    words = f"{row['loss']:.3f}, {'-' if row['score'] is None else format(row['score'], '.3f')}"
    return f"**{words}**" if chosen else words


def _cells(result: Result, row: dict[str, Any], names: Sequence[str]) -> list[str]:
    task, text = row["task"], row["method"]
    return [
        text,
        *(metric_cell(result.metric(name, stage=task, left=text)) for name in names),
        metric_cell(result.find(names[0], stage=f"{task}, difference", left=text, right=REFERENCE)),
        next(
            (
                corrected(c)
                for c in result.tables.get("comparisons", [])
                if (c["task"], c["metric"], c["left"], c["right"]) == (task, names[0], text, REFERENCE)
            ),
            "-",
        ),
        metric_cell(result.find(CHANGE, stage=f"{task}, {CHANGE}", left=text)),
        f"{row['trained_parameters']:,}",
        f"{trained_factor(result, row):.3g}{' (edge)' if row['rate_at_edge'] else ''}",
        number(row["seconds_per_step"]),
        number(row["peak_bytes"] / 2**20),
        number(row["last_losses"]),
    ]


ANALYSIS = Analysis(
    "method_comparison", Config, find, summary,
    least={"rate_extensions": 0, "tuning_steps": 1},
    check=_check,
    # The task, the method, the seed and the factor of a cell are its own, as are the rows and the model.
    free=("tasks", "methods", "searched", "seeds", "rates_from", "chosen_by", "rate_extensions", "partial",
          "run.data_dir", "run.model"),
    about=lambda config: "intervals: 95 %, over other seeds and other validation rows; differences are paired",
)  # fmt: skip
run = ANALYSIS.run

if __name__ == "__main__":
    ANALYSIS.command(__doc__)
