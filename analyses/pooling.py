"""How does the pooling of an encoder change what a classifier learns, and its kernel?

For every task and pooling this computes the score of each method at the same learning rates, and the share of every
kind of layer in the trace of full fine-tuning's kernel at initialisation, without the head, in standard
parametrisation.

    python -m analyses.pooling --tasks demo sst2 --data-dir glue --output-dir results/pooling

The same command resumes an interrupted grid.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import tyro

import ntk
from analyses.core.analysis import Analysis, Findings, GridOutput, Runs
from analyses.peft_kernels.layers import place_methods, places_of
from analyses.records import Block, Metric, Result, number, summary_of_blocks
from analyses.subjects.batch import held_out
from analyses.subjects.training_run import RunConfig, chance_score, training_run
from propulsion.data import TaskData
from propulsion.errors import UserError
from propulsion.methods import parse_methods
from propulsion.pretrained import DEFAULT_MODEL_NAME, Pooling, check_pooling
from propulsion.training import TrainingOptions

COST = "five minutes"


@dataclass(frozen=True)
class Config(GridOutput):
    """Options of the analysis."""

    tasks: tuple[str, ...] = ("demo",)
    """Classification and regression tasks."""
    poolings: tuple[Pooling, ...] = ("mean", "pooler")
    """Poolings to compare."""
    methods: tuple[str, ...] = ("full", "propulsion:positions=all", "lora", "head")
    """Methods, each NAME or NAME:OPTION=VALUE,OPTION=VALUE."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the head, the data order, dropout and the methods' own random draws."""
    n_examples: int = 32
    """Held-out examples that the kernels are computed on."""
    run: tyro.conf.OmitArgPrefixes[RunConfig] = field(
        default_factory=lambda: RunConfig(training=TrainingOptions(max_steps=150, max_length=96))
    )
    """Options of every run."""


def _check(config: Config) -> None:
    for pooling in config.poolings:
        check_pooling(pooling)
    if not config.poolings or not config.tasks:
        raise UserError("there must be a pooling and a task")
    if config.run.pooling != "auto":
        raise UserError("give the poolings to compare by --poolings, and leave out --pooling")


def find(config: Config, runs: Runs) -> Findings | None:
    """Train every method and compute every kernel, or read them from their stored cells; None if some are missing."""
    methods = parse_methods(config.methods)
    data = config.run.load_all(config.tasks)
    scores, shares = [], []
    for task, pooling, seed in product(config.tasks, config.poolings, config.seeds):
        place = {"task": task, "pooling": pooling, "seed": seed}
        pooled = replace(config.run, pooling=pooling)
        cells = runs.of(data[task], pooled.identity(data[task]))
        kernel, trained = partial(_kernel, config, data[task]), partial(_trained, config, data[task])
        found = cells.cell(f"{task} {pooling} kernel seed {seed}", kernel, pooling=pooling, seed=seed)
        shares += [place | row for row in found["shares"]] if found else []
        for text, method in methods.items():
            label = f"{task} {pooling} {text} seed {seed}"
            cell = cells.cell(label, trained, pooling=pooling, method=method, seed=seed)
            scores += [place | {"method": text} | cell] if cell else []
    if runs.missing:
        return None
    chances = {task: chance_score(rows) for task, rows in data.items()}
    readings = [replace(config.run, pooling=pooling) for pooling in config.poolings]
    return Findings(
        metrics=[_mean(scores, row) for row in scores if row["seed"] == config.seeds[0]],
        tables={"scores": scores, "shares": shares, "chance": [{"task": t, "score": s} for t, s in chances.items()]},
        model={"name": config.run.model or DEFAULT_MODEL_NAME, "pooling": list(config.poolings),
               "fingerprint": [reading.model_identity()["fingerprint"] for reading in readings]},
        dataset={"name": ", ".join(config.tasks), "metric": {t: rows.task.metrics[0] for t, rows in data.items()},
                 "fingerprint": {task: rows.fingerprint for task, rows in data.items()}},
        coverage={"full": "the backbone, without the head"},
    )  # fmt: skip


def _mean(rows: list[dict[str, Any]], like: dict[str, Any]) -> Metric:
    """The mean score over seeds for the task, pooling and method of the row `like`."""
    same = [row["score"] for row in rows if all(row[key] == like[key] for key in ("task", "pooling", "method"))]
    label = f"{like['task']}, {like['pooling']}, {like['method']}"
    return Metric("score", float(np.mean(same)), None, None, "", "trained", label, "")


def _trained(config: Config, data: TaskData, *, pooling: Pooling, method: Any, seed: int) -> dict[str, Any]:
    found = training_run(replace(config.run, pooling=pooling), data, method, seed=seed)
    names = ("validation_loss", "trained_parameters", "learning_rates", "scores")
    return {name: found[name] for name in names} | {
        "score": found["scores"][data.task.metrics[0]],
        "first_loss": float(np.mean(found["losses"][:10])), "last_loss": float(np.mean(found["losses"][-10:])),
    }  # fmt: skip


def _kernel(config: Config, data: TaskData, *, pooling: Pooling, seed: int) -> dict[str, Any]:
    """Shares of each kind of layer and block in the traces of the backbone's kernel and of Propulsion's."""
    model, tokenizer = replace(config.run, pooling=pooling).start(data, seed=seed)
    length, device = config.run.training.max_length, config.run.device
    inputs, _ = held_out(data, tokenizer, config.n_examples, seed, max_length=length, device=device)
    places = places_of(model)
    kernels = ntk.adapter_kernels(model, inputs, place_methods(places), reduce="trace")
    traces = {name: float(ntk.trace(kernel)) for name, kernel in kernels.items()}
    whole = {of: sum(t for name, t in traces.items() if name.startswith(f"{of}: ")) for of in ("full", "Propulsion")}
    shares = [
        {"kind": place.kind, "block": place.block, "layers": len(place.modules)}
        | {of: traces[f"{of}: {place.label}"] / whole[of] if f"{of}: {place.label}" in traces else None for of in whole}
        for place in places
    ]
    return {"shares": shares, "full_trace": whole["full"], "propulsion_trace": whole["Propulsion"]}


@summary_of_blocks
def summary(result: Result) -> Iterator[Block]:
    """Scores by task, pooling and method; shares of tr K_F by kind of layer, and by block."""
    tasks, poolings, methods = (list(result.config[name]) for name in ("tasks", "poolings", "methods"))
    scores = {m.left: m.value for m in result.metrics}
    chance = {row["task"]: row["score"] for row in result.tables["chance"]}
    columns = list(product(tasks, poolings))
    rows = [[f"{t}, {p}", number(chance[t]), *(number(scores[f"{t}, {p}, {m}"]) for m in methods)] for t, p in columns]
    yield ["score", "one answer throughout", *methods], rows
    for key, words in (("kind", "share of tr K_F by kind of layer"), ("block", "by block")):
        labels = dict.fromkeys(row[key] for row in result.tables["shares"])
        yield [words, *(f"{t}, {p}" for t, p in columns)], [
            ["no block" if label is None else str(label),
             *(number(_share(result, t, p, key, label)) for t, p in columns)]
            for label in labels
        ]  # fmt: skip


def _share(result: Result, task: str, pooling: str, key: str, label: Any) -> float:
    rows = [r for r in result.tables["shares"] if (r["task"], r["pooling"], r[key]) == (task, pooling, label)]
    return sum(row["full"] for row in rows) / len(result.config["seeds"])


ANALYSIS = Analysis(
    "pooling", Config, find, summary,
    least={"n_examples": 1},
    check=_check,
    # The pooling, the method and the seed of a cell are its own, as are task, rows and model.
    free=("tasks", "poolings", "methods", "seeds", "run.data_dir", "run.model"),
    draws=False,
)  # fmt: skip
run = ANALYSIS.run

if __name__ == "__main__":
    ANALYSIS.command(__doc__)
