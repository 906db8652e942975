"""The tables of the choice, its advice in one sentence, and the command that trains the chosen method."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from analyses.records import STAGES, Block, Result, interval, number, summary_of_blocks
from propulsion.data import TaskData

SCORE = "predicted score"
STAGE = STAGES[1]
_MEGABYTE = 2**20
_KINDS = 4  # Kinds of layers that a table names.


@summary_of_blocks
def summary(result: Result) -> Iterator[Block]:
    """The ranked candidates, the predictors beside the choice, and what was left out."""
    dataset = result.dataset
    metric = dataset["metric"]
    header = ["candidate", "trains", "parameters", "memory, MB", "s/step", "steps", f"predicted {metric}",
              "within 1 SE", "learning rates"]  # fmt: skip
    yield header, [
        [f"{row['rank']}. {row['candidate']}", _shortened(row["trains"]), f"{row['trained_parameters']:,}",
         number(row["peak_bytes"] / _MEGABYTE), number(row["seconds_per_step"]), str(row["steps"]),
         interval(row["score"], row["low"], row["high"]), f"{row['near_best']:.0%}", _rates(row["learning_rates"])]
        for row in result.tables["ranking"]
    ]  # fmt: skip
    chance = dataset.get("chance")
    one = "" if chance is None else f"; one answer for all rows: {number(chance)}"
    yield f"{dataset['held_out']} held-out rows{one}"
    predictors = result.tables["predictors"]
    yield (
        ["beside the choice", *(row["predictor"] for row in predictors)],
        [
            [row["candidate"], *(number(entry["values"].get(row["candidate"])) for entry in predictors)]
            for row in result.tables["ranking"]
        ],
    )
    yield (
        ["predictor", "candidates", "rank correlation with the predicted scores", "source"],
        [
            [row["predictor"], str(row["candidates"]), number(row["rank_correlation"]), row["source"]]
            for row in predictors
        ],
    )
    yield from (f"{row['candidate']} left out: {row['reason']}" for row in result.tables["left_out"])


def _shortened(trains: str) -> str:
    """The layers that a candidate trains, of which only the first are named if there are many."""
    kinds = trains.split(", ")
    return trains if len(kinds) <= _KINDS else f"{', '.join(kinds[: _KINDS - 1])} and {len(kinds) - _KINDS + 1} more"


def _rates(rates: Mapping[str, float]) -> str:
    return ", ".join(f"{role} {rate:.2g}" for role, rate in rates.items())


def advice(ranking: Sequence[Mapping[str, Any]], metric: str, rows: int, steps: int) -> str:
    """One sentence: what to train, how sure that is, and the cheapest candidate that is about as good."""
    best = ranking[0]
    score = f"{metric} {interval(best['score'], best['low'], best['high'])}"
    said = f"Train {best['candidate']}: predicted {score} after {steps} steps, on {rows} held-out rows"
    near = [row for row in ranking[1:] if row["near_best"] >= 0.5]
    count = len(ranking) - 1
    if not count:
        return f"{said}; it was the only candidate."
    if not near:
        return f"{said}; no other of the {count + 1} candidates is within one standard error of it in most resamples."
    fewest = min([best, *near], key=lambda row: row["trained_parameters"])
    others = f"{len(near)} of the {count} others {'is' if len(near) == 1 else 'are'} about as good"
    if fewest is best:
        return f"{said}; {others}, and it trains the fewest parameters of them."
    number_of = f"{fewest['trained_parameters']:,}"
    return f"{said}; {others}, of which {fewest['candidate']} trains the fewest parameters ({number_of})."


def train_command(config: Any, data: TaskData, row: Mapping[str, Any]) -> str:
    """The `propulsion.train` command that trains a candidate on all training rows, at the rates it was tried with."""
    run, training = config.run, config.run.training
    name, _, options = row["candidate"].partition(":")
    rates = row["learning_rates"]
    body = [rate for role, rate in rates.items() if role != "head"]
    words: list[Any] = []
    if run.task_file is not None:
        words += ["--task-file", run.task_file]
    elif run.text_columns:
        words += ["--text-columns", *run.text_columns, "--label-column", run.label_column]
    else:
        words += ["--task", config.task]
    words += ["--data-dir", run.data_dir] if run.data_dir is not None else []
    words += ["--model", run.model] if run.model is not None else []
    words += ["--pooling", run.pooling] if run.pooling != "auto" else []
    words += [f"--{option.replace('_', '-')}" for option, accepted in run.loading.items() if accepted]
    words += ["--method", name, *(["--method-options", *options.split(",")] if options else [])]
    words += ["--degree", f"{run.degree:g}"] if run.degree is not None and name == "propulsion" else []
    words += ["--learning-rate", f"{body[0]:.4g}"] if body else []
    words += ["--head-learning-rate", f"{rates['head']:.4g}"] if "head" in rates else []
    words += ["--max-steps", training.max_steps, "--per-device-train-batch-size", training.per_device_train_batch_size]
    words += ["--max-length", training.max_length] if training.max_length is not None else []
    words += ["--use-cpu"] if run.device == "cpu" else []
    words += ["--seed", training.seed, "--output-dir", f"results/train-{data.task.name}-{name}"]
    return shlex.join(["python", "-m", "propulsion.train", *map(str, words)])
