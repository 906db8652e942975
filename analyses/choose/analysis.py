"""The configuration, the rounds and the result of the choice."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import tyro

from analyses.choose import halving
from analyses.choose.evidence import FULL, has_own_pass, kernels_of
from analyses.choose.halving import Cost, Rung
from analyses.choose.predictors import PREDICTORS, Evidence, rank_correlation
from analyses.choose.ranking import Predicted, predicted_scores
from analyses.choose.tables import SCORE, STAGE, advice, summary, train_command
from analyses.choose.trial import evidence_of, score_and_loss, trial
from analyses.core.analysis import Analysis, Findings, GridOutput, Runs
from analyses.core.cells import ARRAYS, Cells
from analyses.records import Metric
from analyses.subjects.batch import labels_of
from analyses.subjects.training_run import RunConfig, dataset_identity, scores, training_run, tuning_split
from propulsion.data import Limits, TaskData, check_inputs
from propulsion.errors import UserError
from propulsion.methods import Method, check_options, parse_methods
from propulsion.training import TrainingOptions

FEWEST_ROWS = 16
"""Training rows without which nothing can be held out to choose by."""
_PROBE_STEPS = 4
_SAFETY = 1.3
"""A candidate whose step was not timed yet is expected to take this much longer than one of full fine-tuning."""
_KERNEL_PASSES = 4.0
"""Cost of the kernel of an example and output, in steps of training of one example."""


@dataclass(frozen=True)
class Config(GridOutput):
    """Options of the analysis."""

    task: str = "demo"
    """Classification or regression task; of rows of your own, it is made from their columns."""
    # A factory, since the documentation site reads words with a colon in a signature as a reference.
    candidates: tuple[str, ...] = field(
        default_factory=lambda: (
            "full", "lora:r=8", "propulsion", "bitfit", "head", "ia3", "ln_tuning", "propulsion:positions=attn",
            "lora:r=32", "lora:r=2", "propulsion:positions=mlp", "vera", "propulsion:positions=query+value",
            "lora:use_dora=true", "propulsion:positions=embedding",
        )
    )  # fmt: skip
    """Methods to choose from, each NAME or NAME:OPTION=VALUE,OPTION=VALUE (propulsion.methods); a budget that is too
    small for all tries the first ones."""
    budget_minutes: float = 10.0
    """Minutes that the choice may take, those of interrupted calls included."""
    n_examples: int = 48
    """Training rows of the kernels, which are computed if time is left; 0 for none."""
    resamples: int = 1000
    """Bootstrap resamples of the held-out rows behind each interval."""
    run: tyro.conf.OmitArgPrefixes[RunConfig] = field(
        default_factory=lambda: RunConfig(n_train=2000, training=TrainingOptions(max_steps=300, max_length=128))
    )
    """Options of every run; max_steps is that of the run that the printed command makes, and the longest that is
    tried."""

    @property
    def seed(self) -> int:
        """The one seed of the runs."""
        return self.run.training.seed


@dataclass
class _Clock:
    """Seconds that were spent, those of stored cells included, and what a run of each candidate takes."""

    seconds: float
    base: Cost
    spent: float = 0.0
    costs: dict[str, Cost] = field(default_factory=dict)

    def expected(self, name: str, steps: int) -> float:
        """Seconds that a run of a candidate is expected to take."""
        known = self.costs.get(name)
        return known.of(steps) if known else replace(self.base, step=_SAFETY * self.base.step).of(steps)

    def add(self, name: str, steps: int, cell: Mapping[str, Any]) -> None:
        """Count a finished run."""
        self.spent += cell["seconds"]
        if (step := cell.get("seconds_per_step")) is not None:
            self.costs[name] = Cost(max(cell["seconds"] - steps * step, 0.0), step)

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.seconds - self.spent


def find(config: Config, runs: Runs) -> Findings | None:
    """Try the candidates in rounds, then compute the predictors beside the choice; None if cells are missing."""
    started = time.perf_counter()
    methods = parse_methods(config.candidates)
    data = config.run.load(config.task)
    if len(data.train) < FEWEST_ROWS:
        raise UserError(f"{len(data.train)} training rows are too few to choose by: give at least {FEWEST_ROWS}")
    part = tuning_split(data)
    if len(set(part.train[data.task.label_column])) < 2:
        raise UserError(f"the {len(part.train)} rows to train on have one label only: give more rows of each class")
    _, tokenizer = config.run.start(data, seed=config.seed)
    check_inputs(data, tokenizer, Limits(config.run.training.max_length))
    cells = runs.of(data, config.run.identity(data))
    cost = cells.cell("cost of a step", partial(_cost, config, part, started))
    if cost is None:
        return None
    clock = _Clock(60 * config.budget_minutes, Cost(cost["fixed"], cost["step"]), spent=cost["seconds"])
    budget = {"seconds": clock.seconds, "spent": clock.spent, "most": config.run.training.max_steps}
    count = halving.affordable(len(methods), clock.base, **budget)
    tried = dict(list(methods.items())[:count])
    plan = halving.plan(count, clock.base, **budget)
    words = ", then ".join(f"{rung.candidates} for {rung.steps} steps" for rung in plan)
    print(f"{count} of {len(methods)} candidates in {config.budget_minutes:g} minutes: {words}", flush=True)
    rounds, skipped = _rounds(config, cells, part, tried, plan, clock)
    if runs.missing:
        return None
    needed = halving.minutes_for(len(methods), clock.base, cost["seconds"], config.run.training.max_steps)
    skipped |= {
        name: f"all candidates need a budget of about {needed:g} minutes" for name in methods if name not in tried
    }
    if not rounds:
        raise UserError("no candidate could be trained: " + "; ".join(f"{n}: {why}" for n, why in skipped.items()))
    kernels = _kernels(config, cells, part, {name: methods[name] for name in rounds[0]}, clock)
    if runs.missing:
        return None
    return _found(config, data, part, plan, rounds, skipped, kernels, clock)


def _cost(config: Config, part: TaskData, started: float) -> dict[str, Any]:
    """What a run takes: seconds of a step of full fine-tuning, and of all that is not steps; and seconds until now."""
    steps = min(_PROBE_STEPS, config.run.training.max_steps)
    began = time.perf_counter()
    shorter = replace(config.run, training=replace(config.run.training, max_steps=steps))
    found = training_run(shorter, part, Method(FULL), seed=config.seed)
    now, step = time.perf_counter(), found["seconds_per_step"]
    return {"seconds": now - started, "step": step, "fixed": max(now - began - steps * step, 0.0)}


Rounds = list[dict[str, dict[str, Any]]]


def _rounds(
    config: Config, cells: Cells, part: TaskData, methods: Mapping[str, Method], plan: Sequence[Rung], clock: _Clock
) -> tuple[Rounds, dict[str, str]]:
    """The finished runs of each round by candidate, and why other candidates were not tried or left out."""
    rounds: Rounds = []
    skipped: dict[str, str] = {}
    names = list(methods)
    for k, rung in enumerate(plan):
        found: dict[str, dict[str, Any]] = {}
        cut = False
        for name in names[: rung.candidates] if k else names:
            if clock.expected(name, rung.steps) > clock.left:
                cut = True
                if not k:
                    skipped[name] = "the budget was spent"
                continue
            rates = rounds[0][name]["learning_rates"] if k else None
            label = f"{name}, {rung.steps} steps"
            compute = partial(_tried, config, part)
            cell = cells.cell(label, compute, method=methods[name], steps=rung.steps, rates=rates, first=k == 0)
            if cell is None:
                return rounds, skipped
            clock.add(name, rung.steps, cell)
            if cell["failed"]:
                skipped[name] = cell["failed"]
                for earlier in rounds:
                    earlier.pop(name)
            else:
                found[name] = cell
            _report(part, name, cell, clock)
        if not found or (k and cut):
            break  # A later round that the budget cut short compares nothing.
        rounds.append(found)
        names = halving.best({name: score_and_loss(cell) for name, cell in found.items()}, len(found))
    return rounds, skipped


def _report(part: TaskData, name: str, cell: Mapping[str, Any], clock: _Clock) -> None:
    left = f"{clock.left / 60:.1f} of {clock.seconds / 60:g} minutes left"
    if cell["failed"]:
        print(f"  {name} is left out: {cell['failed']}; {left}", flush=True)
        return
    metric, score = next(iter(cell["scores"].items()))
    print(f"  held-out {metric} {np.nan if score is None else score:.3f}; {left}", flush=True)


def _tried(
    config: Config, part: TaskData, *, method: Method, steps: int, rates: Mapping[str, float] | None, first: bool
) -> dict[str, Any]:
    return trial(config.run, part, method, seed=config.seed, steps=steps, rates=rates, first=first)


def _kernels(
    config: Config, cells: Cells, part: TaskData, methods: Mapping[str, Method], clock: _Clock
) -> dict[str, np.ndarray]:
    """The arrays of `kernels_of`; empty if they are not wanted, or the rest of the budget does not suffice."""
    batch = config.run.training.per_device_train_batch_size
    each = _KERNEL_PASSES * clock.base.step / batch * part.task.num_labels
    n = min(config.n_examples, len(part.train) // 2)  # The head is trained on the other rows.
    passes = 1 + sum(map(has_own_pass, methods.values()))
    expected = clock.base.fixed + passes * each * n
    if n < 2 or expected > clock.left:
        if n >= 2:
            print(f"no time for kernels of {n} rows: they need about {expected:.0f} seconds", flush=True)
        return {}

    def compute(*, candidates: list[str], n: int) -> dict[str, Any]:
        started = time.perf_counter()
        arrays = kernels_of(config.run, part, {name: methods[name] for name in candidates}, n, config.seed)
        return {"seconds": time.perf_counter() - started, ARRAYS: arrays}

    cell = cells.cell("kernels", compute, candidates=list(methods), n=n)
    if cell is None:
        return {}
    clock.spent += cell["seconds"]
    return cell[ARRAYS]


# --- the result -----------------------------------------------------------------------------------------------------


def _found(
    config: Config, data: TaskData, part: TaskData, plan: Sequence[Rung], rounds: Rounds, skipped: Mapping[str, str],
    kernels: Mapping[str, np.ndarray], clock: _Clock,
) -> Findings:  # fmt: skip
    labels, task = labels_of(part), data.task
    metric = task.metrics[0]

    def score_of(cell: Mapping[str, Any], rows: np.ndarray) -> float:
        outputs = cell[ARRAYS]["logits"][rows]
        predictions = outputs[:, 0] if task.is_regression else outputs.argmax(axis=1)
        return scores(task.name, predictions, labels[rows])[metric]

    each = [{name: partial(score_of, cell) for name, cell in found.items()} for found in rounds]
    predicted = predicted_scores(each, len(labels), resamples=config.resamples)
    order = _order(rounds, predicted)
    ranking = [_ranked(config, rounds, plan, name, place, predicted[name]) for place, name in enumerate(order, start=1)]
    evidence = {name: evidence_of(part, cell, kernels, name) for name, cell in rounds[0].items()}
    beside = _beside(evidence, predicted)
    winner = ranking[0]
    return Findings(
        [Metric(SCORE, p.value, p.low, p.high, metric, STAGE, name, "") for name, p in predicted.items()],
        tables={
            "ranking": ranking,
            "rounds": [
                {"candidate": name, "steps": rung.steps, "score": score_and_loss(cell)[0],
                 "loss": score_and_loss(cell)[1]}
                for rung, found in zip(plan, rounds) for name, cell in found.items()
            ],
            "predictors": beside,
            "left_out": [{"candidate": name, "reason": why} for name, why in skipped.items()],
            "advice": [{
                "sentence": advice(ranking, metric, len(labels), plan[len(rounds) - 1].steps),
                "command": train_command(config, data, winner),
            }],
        },
        arrays={"labels": labels} | {f"logits.{name}": _last(rounds, name)[ARRAYS]["logits"] for name in order},
        model=config.run.model_identity(),
        dataset=dataset_identity(data) | {"source": data.source.rsplit("/", 1)[-1], "metric": metric,
                                          "held_out": len(labels), "chance": _chance(data, labels)},
        seconds={"of the budget": clock.spent},
        # The numbers of rows that there were, with which the same rows are drawn again.
        config={"run": asdict(config.run) | {"n_train": len(data.train), "n_validation": len(data.validation)}},
        coverage={},
    )  # fmt: skip


def _chance(data: TaskData, labels: np.ndarray) -> float | None:
    """The best score of one answer for all held-out rows; None for a correlation, where it has none."""
    if data.task.is_regression:
        return None
    found = [next(iter(scores(data.task.name, np.full_like(labels, c), labels).values()))
             for c in range(data.task.num_labels)]  # fmt: skip
    return float(max(found))


def _last(rounds: Rounds, name: str) -> dict[str, Any]:
    return next(found[name] for found in reversed(rounds) if name in found)


def _order(rounds: Rounds, predicted: Mapping[str, Predicted]) -> list[str]:
    """The candidates from best to worst: those of the last round by score and loss, then by predicted score."""
    last = halving.best({name: score_and_loss(cell) for name, cell in rounds[-1].items()}, len(rounds[-1]))
    others = sorted((name for name in predicted if name not in rounds[-1]), key=lambda name: -predicted[name].value)
    return [*last, *others]


def _ranked(
    config: Config, rounds: Rounds, plan: Sequence[Rung], name: str, place: int, predicted: Predicted
) -> dict[str, Any]:
    first, last = rounds[0][name], _last(rounds, name)
    steps = max(rung.steps for rung, found in zip(plan, rounds) if name in found)
    return {
        "rank": place, "candidate": name, "trains": first["trained"], "steps": steps,
        "trained_parameters": first["trained_parameters"],
        "peak_bytes": max(found[name]["peak_bytes"] for found in rounds if name in found),
        "seconds_per_step": last["seconds_per_step"],
        "score": predicted.value, "low": predicted.low, "high": predicted.high, "near_best": predicted.near,
        "learning_rates": first["learning_rates"],
    }  # fmt: skip


def _beside(evidence: Mapping[str, Evidence], predicted: Mapping[str, Predicted]) -> list[dict[str, Any]]:
    """The value of every predictor for every candidate, and its rank correlation with the predicted scores."""
    table = []
    for predictor, entry in PREDICTORS.items():
        values = {name: entry.function(e) for name, e in evidence.items()}
        known = [name for name, value in values.items() if value is not None and np.isfinite(value)]
        signed = np.array([entry.sign * float(values[name] or 0.0) for name in known])
        agreement = rank_correlation(signed, np.array([predicted[name].value for name in known]))
        table.append({"predictor": predictor, "source": entry.source, "candidates": len(known),
                      "rank_correlation": agreement, "values": values})  # fmt: skip
    return table


def _check(config: Config) -> None:
    for method in parse_methods(config.candidates).values():
        check_options(method)
        if method.name == "none":
            raise UserError("candidate none trains nothing: leave it out")


ANALYSIS = Analysis(
    "choose", Config, find, summary,
    least={"n_examples": 0, "resamples": 2},
    above={"budget_minutes": 0},
    check=_check,
    # Method, steps and rates of a cell are its own, as are task, rows and model.
    free=("task", "candidates", "budget_minutes", "n_examples", "resamples", "run.data_dir", "run.model"),
    about=lambda config: "intervals: 95 %, bootstrap over the held-out rows",
    finding=lambda result: f"{result.tables['advice'][0]['sentence']}\n\n{result.tables['advice'][0]['command']}",
    variant=lambda config: f"-{config.task}",
)  # fmt: skip
run = ANALYSIS.run
