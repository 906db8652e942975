"""The configuration, cells and result of the analysis: measurements during training, over methods and seeds."""

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from analyses.core.analysis import Analysis, Findings, GridOutput, Runs
from analyses.core.cells import ARRAYS
from analyses.kernel_drift.measures import Cells, jacobian_norms, method_estimates, pair_estimates, stage_metrics
from analyses.kernel_drift.probe import Probe
from analyses.kernel_drift.tables import summary
from analyses.records import STAGES
from analyses.subjects.batch import held_out
from analyses.subjects.cost import memory_budget
from analyses.subjects.learning_rates import check_origin, factors_of
from analyses.subjects.training_run import RatedRuns, chance_score, dataset_identity, method_cells, training_run
from propulsion.data import TaskData
from propulsion.errors import UserError
from propulsion.methods import Method, parse_methods
from propulsion.training import evaluate


@dataclass(frozen=True)
class Config(RatedRuns, GridOutput):
    """Options of the analysis."""

    methods: tuple[str, ...] = ("full", "propulsion:positions=all", "lora")
    """Methods, each NAME or NAME:OPTION=VALUE,OPTION=VALUE."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the head, the data order, dropout and the methods' own random draws."""
    checkpoints: tuple[float, ...] = (0.1, 0.3, 1.0)
    """Shares of the steps after which to measure, besides before the first step and after the last."""
    n_examples: int = 24
    """Held-out examples that kernels and outputs are computed on, the same for all runs."""
    n_jacobians: int = 8
    """Number of these examples, the first ones, on which Jacobians are compared."""
    block: str = "value"
    """Name of the module whose last occurrence in the network has its gradients shown entry by entry."""
    width: int = 48
    """Number of entries of that module's gradients that are shown."""
    null_draws: int = 3
    """Draws of each random null model."""
    resamples: int = 200
    """Bootstrap resamples behind each interval over examples."""
    memory_budget_gb: float | None = None
    """Memory for kernels in GB; by default half of the free memory."""

    @property
    def steps(self) -> list[int]:
        """Steps after which to measure: 0, those of the checkpoints, and the last."""
        last = self.run.training.max_steps
        return sorted({0, last} | {max(1, round(share * last)) for share in self.checkpoints})


def find(config: Config, runs: Runs) -> Findings | None:
    """Compute the missing cells and summarise all; None if some are still missing."""
    methods = parse_methods(config.methods)
    factors = factors_of(methods, config.comparison, config.task)
    data = config.run.load(config.task)
    check_origin(config.comparison, data, config.run.model_identity)
    tokenizer = config.run.start(data, seed=0)[1]
    length = config.run.training.max_length
    inputs, labels = held_out(data, tokenizer, config.n_examples, 0, max_length=length, device=config.run.device)
    shared = runs.of(data, config.run.identity(data))
    compute = partial(_cell, config, data, inputs, tokenizer)
    cells = method_cells(shared, config.task, methods, factors, config.seeds, compute)
    return None if runs.missing else _summarised(config, data, labels, cells)


def _cell(
    config: Config, data: TaskData, inputs: dict[str, Tensor], tokenizer: Any, *, method: Method, seed: int,
    factor: float,
) -> dict[str, Any]:  # fmt: skip
    """Train once, and measure at the chosen steps."""
    started = time.time()

    def score(model: Any) -> float:
        return next(iter(evaluate(model, tokenizer, data, max_length=config.run.training.max_length).values()))

    with memory_budget(config.memory_budget_gb) as budget:
        probe = Probe(config.steps[1:], inputs, n_jacobians=config.n_jacobians, module=config.block,
                      width=config.width, score=score, memory_budget=budget)  # fmt: skip
        found = training_run(config.run, data, method, seed=seed, rate_multiplier=factor, callbacks=[probe])
    probe.points[-1]["score"] = next(iter(found["scores"].values()))
    kept = ("scores", "losses", "trained_parameters", "learning_rates", "seconds_per_step")
    return {
        "seed": seed,
        "rate_factor": factor,
        "points": probe.points,
        "own_parameters": probe.own_size,
        "places": probe.places,
        "block": str(probe.block),
        "seconds": {"all": time.time() - started, "measuring": probe.seconds},
        ARRAYS: probe.arrays(),
        **{name: found[name] for name in kept},
    }


def _summarised(config: Config, data: TaskData, labels: np.ndarray, cells: Cells) -> Findings:
    methods, checkpoints, pairs = [], [], []
    arrays: dict[str, np.ndarray] = {"labels": labels, "steps": np.array(config.steps)}
    for place, step in enumerate(config.steps):
        for text, runs in cells.items():
            found = method_estimates(runs, place, config.resamples)
            checkpoints += [{"method": text, "step": step, "quantity": name} | e.row() for name, e in found]
        pairs += [
            {"left": left, "right": right, "step": step, "quantity": name} | e.row()
            for name, left, right, e in pair_estimates(cells, place, config.resamples)
        ]
    for text, runs in cells.items():
        kept = ("own_parameters", "trained_parameters", "rate_factor", "block", "places")
        methods.append({"method": text, "seeds": len(runs)} | {name: runs[0][name] for name in kept})
        norms = [jacobian_norms(run, -1) for run in runs]
        # Where the initial Jacobian of an example is zero in some layers, the relative change is undefined.
        with np.errstate(divide="ignore", invalid="ignore"):
            relative = [np.sqrt(n["moved"].numpy() / n["start"].numpy()).T for n in norms]
        arrays[f"jacobian_drift.{text}"] = np.mean(relative, axis=0)
        arrays |= {f"{name}.{text}": runs[0][ARRAYS][name][-1] for name in ("block_start", "block_now")}
        for run in runs:
            for stage, index in zip(STAGES, (0, -1)):
                arrays[f"{stage}.{text}.seed{run['seed']}"] = run[ARRAYS]["kernels"][index]
    return Findings(
        metrics=stage_metrics(cells, config.resamples, config.null_draws),
        tables={"methods": methods, "checkpoints": checkpoints, "pairs": pairs},
        arrays=arrays,
        model=config.run.model_identity(),
        dataset=dataset_identity(data) | {"metric": data.task.metrics[0], "chance": chance_score(data)},
        seconds={text: float(np.mean([run["seconds"]["all"] for run in runs])) for text, runs in cells.items()},
        coverage={
            row["method"]: f"{row['own_parameters']:,} parameters of the backbone that it trains, without the head"
            for row in methods
        },
    )


def _check(config: Config) -> None:
    if config.n_jacobians > config.n_examples:
        raise UserError(f"n_jacobians must be at most the {config.n_examples} examples; got {config.n_jacobians}")
    if not all(0 < share <= 1 for share in config.checkpoints):
        raise UserError(f"checkpoints are shares of the steps, above 0 and at most 1; got {config.checkpoints}")


ANALYSIS = Analysis(
    "kernel_drift", Config, find, summary,
    least={"n_examples": 2, "n_jacobians": 2, "width": 1, "null_draws": 1, "resamples": 1},
    above={"memory_budget_gb": 0},
    check=_check,
    # The method, the seed and the factor of a cell are its own, as are task, rows and model.
    free=("task", "methods", "seeds", "comparison", "null_draws", "resamples", "memory_budget_gb", "run.data_dir",
          "run.model"),
)  # fmt: skip
run = ANALYSIS.run
