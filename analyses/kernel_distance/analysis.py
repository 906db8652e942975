"""The configuration, measurements and result of the analysis: both kernels, before and after training, over seeds."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor

import ntk
from analyses.core.analysis import Analysis, Findings, GridOutput, Runs, seeds_of
from analyses.core.comparison import SeedComparison, draw_name, over_seeds
from analyses.kernel_distance.kernels import ADAPTER, FULL, KERNELS, PAIRS, ModelKernels, model_kernels
from analyses.kernel_distance.tables import finding, summary
from analyses.records import STAGES, Metric
from analyses.subjects.batch import held_out
from analyses.subjects.cost import memory_budget
from analyses.subjects.nulls import model_nulls
from analyses.subjects.options import KernelOptions
from analyses.subjects.parameters import is_scale
from analyses.subjects.training_run import dataset_identity
from propulsion.data import Limits, TaskData, check_inputs, load_task_data
from propulsion.data.tasks import get_labelled_task
from propulsion.methods import Method, check_options
from propulsion.pretrained import DEFAULT_MODEL_NAME, pooling_of
from propulsion.training import TrainingOptions, apply_propulsion, evaluate, train

LABELS = "labels"


@dataclass(frozen=True)
class Config(KernelOptions, GridOutput):
    """Options of the analysis."""

    task: str = "demo"
    """Task: demo (embedded, no network), or sst2, rte, cola, stsb, mrpc, qqp, mnli, qnli."""
    n_examples: int = 24
    """Held-out examples that the kernels are computed on."""
    n_train: int | None = None
    """Number of training examples, drawn by the seed; all of them by default."""
    n_validation: int | None = None
    """Number of held-out examples for the task scores, including those of the kernels; all of them by default."""
    degree: float | None = None
    """Propulsion's degree k; by default the paper's for the task."""
    positions: tuple[str, ...] = ("all",)
    """Layers that have a scale vector: all, attn, mlp, embedding, query, key, value, attention_output."""
    training: tyro.conf.OmitArgPrefixes[TrainingOptions] = field(default_factory=lambda: TrainingOptions(max_steps=60))
    """How both copies are trained."""
    seeds: tuple[int, ...] = ()
    """Seeds with which the whole measurement is repeated; by default only the one of --seed."""
    null_draws: int = 3
    """Draws of each random null model, in each seed."""
    resamples: int = 200
    """Bootstrap resamples behind each interval of a single seed."""
    memory_budget_gb: float | None = None
    """Memory for features and kernels in GB; by default half of the free memory."""

    @property
    def seed(self) -> int:
        """The seed of a single run."""
        return self.training.seed

    def of_seed(self, seed: int) -> "Config":
        """The configuration with only this seed."""
        return replace(self, seeds=(), training=replace(self.training, seed=seed))


@dataclass(frozen=True)
class Setting:
    """The inputs of one run: two copies of one pre-trained model, the data, and the held-out batch."""

    config: Config
    data: TaskData
    tokenizer: Any
    full: Any
    adapted: Any
    inputs: dict[str, Tensor]
    labels: np.ndarray
    degree: float

    @property
    def number_of_scales(self) -> int:
        """The number of entries of all scale vectors z together."""
        return sum(p.numel() for name, p in self.adapted.named_parameters() if is_scale(name))


def prepare(config: Config) -> Setting:
    """Load the data and two copies of the model, with the same head; adapt one of them by Propulsion.

    Raises:
        UserError: The data, the model or an option cannot be used.
    """
    get_labelled_task(config.task)
    data = load_task_data(
        config.task,
        data_dir=config.data_dir,
        n_train=config.n_train,
        n_validation=config.n_validation,
        seed=config.seed,
    )
    degree = data.task.degree if config.degree is None else config.degree
    full, tokenizer = config.start(data, seed=config.seed)
    # All rows are tokenized now, so that one that is too long is reported before anything is computed.
    check_inputs(data, tokenizer, Limits(config.training.max_length))
    inputs, labels = held_out(
        data, tokenizer, config.n_examples, config.seed, max_length=config.training.max_length, device=config.device
    )
    copy = config.start(data, seed=config.seed)[0]
    adapted = apply_propulsion(copy, degree=degree, positions=config.positions)
    return Setting(config, data, tokenizer, full, adapted, inputs, labels, degree)


def find(config: Config, runs: Runs) -> Findings | None:
    """Measure both kernels, train both copies and measure again, for every seed; None if a seed is still missing.

    All random draws depend on the seeds alone.
    """
    seeds = seeds_of(config)
    if len(seeds) == 1:
        found = [_measure(config.of_seed(seeds[0]))]
    else:
        # Each seed draws its rows from all of the task's rows.
        data = load_task_data(config.task, data_dir=config.data_dir)
        cells = runs.of(data, config.identity(data))
        each = [cells.cell(f"seed {seed}", lambda seed: _measure(config.of_seed(seed)), seed=seed) for seed in seeds]
        found = [cell for cell in each if cell is not None]
    if runs.missing:
        return None
    first = found[0]
    draws = {f"{stage}.{draw_name(null, i)}" for stage, nulls in first["nulls"].items()
             for null, count in nulls.items() for i in range(count)}  # fmt: skip
    metrics, values, kernels = [], [], []
    for stage in STAGES:
        kernels.append([_at_stage(cell["arrays"], stage) for cell in found])
        comparison = SeedComparison(kernels[-1], seeds, stage, config.resamples, seeds[0])
        metrics += _metrics(comparison, first["nulls"][stage], first["degree"])
        values += [{"stage": stage} | row for row in comparison.values]
    return Findings(
        config={"degree": first["degree"]},
        metrics=metrics,
        tables={
            "scores": _mean_scores([cell["scores"] for cell in found]),
            "layer_shares": first["layer_shares"],
            "drift": _drift(kernels),
            "seed_values": values,
            "seed_scores": [{"seed": seed} | row for seed, cell in zip(seeds, found) for row in cell["scores"]],
        },
        arrays={name: array for name, array in first["arrays"].items() if name not in draws},
        # A cell may be of the same model in another folder: the name is that of this call.
        model=first["model"] | config.model_identity(),
        dataset=first["dataset"],
        seconds={name: sum(cell["seconds"][name] for cell in found) for name in first["seconds"]},
        coverage=first["coverage"],
    )


def _measure(config: Config) -> dict[str, Any]:
    """One seed: kernels, null models and scores, before and after training."""
    setting = prepare(config)
    seconds: dict[str, float] = {}
    scores = [{"model": "untrained"} | _scores(setting, setting.full)]
    arrays, shares, nulls, coverage = {LABELS: setting.labels}, [], {}, {}
    for stage in STAGES:
        if stage == "trained":
            for name, model in (("full fine-tuning", setting.full), ("Propulsion", setting.adapted)):
                with _timed(seconds, f"training, {name}"):
                    train(model, setting.tokenizer, setting.data, config.training)
                scores.append({"model": name} | _scores(setting, model))
        with _timed(seconds, f"kernels, {stage}"), memory_budget(config.memory_budget_gb) as budget:
            kernels = model_kernels(setting.full, setting.inputs, "all", budget)
            kernels |= model_kernels(setting.adapted, setting.inputs, "trainable", budget)
        with _timed(seconds, f"null models, {stage}"):
            drawn = model_nulls(
                setting.full, setting.inputs, kernels.whole[FULL], kernels.traced[ADAPTER], setting.number_of_scales,
                draws=config.null_draws, seed=config.seed,
            )  # fmt: skip
        arrays |= _arrays(kernels, stage)
        for null, draws in drawn.items():
            arrays |= {f"{stage}.{draw_name(null, i)}": kernel.numpy() for i, kernel in enumerate(draws)}
        shares += [{"stage": stage} | row for row in kernels.shares]
        nulls[stage] = {null: len(draws) for null, draws in drawn.items()}
        coverage = coverage or kernels.coverage
    return {
        "degree": setting.degree,
        "scores": scores,
        "layer_shares": shares,
        "nulls": nulls,
        "coverage": coverage,
        "model": _model_identity(setting),
        "dataset": dataset_identity(setting.data) | {"source": setting.data.source},
        "seconds": seconds,
        "arrays": arrays,
    }  # fmt: skip


def _metrics(comparison: SeedComparison, nulls: dict[str, int], degree: float) -> list[Metric]:
    """Metrics of pairs, single kernels and null models at one stage; before training also k*, defined at z = 1."""
    metrics = [metric for left, right in PAIRS for metric in comparison.pair(left, right)]
    metrics += [metric for name in KERNELS for metric in comparison.single(name)]
    if comparison.stage == STAGES[0]:
        # At z = 1, K_P(k) = k^2 K_P(1), and k* is defined by K_P(1).
        def k_star(full: Tensor, adapter: Tensor) -> float:
            return degree * ntk.matching_degree(full, adapter)

        metrics.append(comparison.keep("k_star", k_star, "", FULL, ADAPTER))
    return metrics + comparison.nulls(FULL, nulls)


def _drift(stages: Sequence[Sequence[Mapping[str, Tensor]]]) -> list[dict[str, Any]]:
    """One row for each kernel: its distance from itself before training, 0 if features stay fixed as the paper says."""

    def mean(function: Callable[[Tensor, Tensor], float], name: str) -> float:
        return statistics.mean(function(before[name], after[name]) for before, after in zip(*stages, strict=True))

    return [
        {
            "kernel": name,
            "relative_frobenius": mean(ntk.kernel_distance, name),
            "cka": mean(ntk.cka, name),
            "trace_ratio": mean(lambda before, after: ntk.trace_ratio(after, before), name),
        }
        for name in KERNELS
    ]


def _mean_scores(each: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The scores of every model as means over seeds; not a number if a seed's score is undefined."""

    def mean(rows: Sequence[dict[str, Any]], name: str) -> float:
        return statistics.mean(math.nan if row[name] is None else row[name] for row in rows)

    return [
        {name: value if name == "model" else mean(rows, name) for name, value in rows[0].items()}
        for rows in zip(*each, strict=True)
    ]


def _at_stage(arrays: Mapping[str, np.ndarray], stage: str) -> dict[str, Tensor]:
    """The traced kernels and null models of one stage by their names, in float64."""
    return {
        name.removeprefix(f"{stage}."): torch.from_numpy(array).double()
        for name, array in arrays.items()
        if name.startswith(f"{stage}.")
    }


def _scores(setting: Setting, model: Any) -> dict[str, float]:
    return evaluate(model, setting.tokenizer, setting.data, max_length=setting.config.training.max_length)


def _arrays(kernels: ModelKernels, stage: str) -> dict[str, np.ndarray]:
    """Traced kernels, kernels with all outputs, and spectra of the traced ones, by name."""
    arrays = {}
    for name, traced in kernels.traced.items():
        arrays[f"{stage}.{name}"] = traced.numpy()
        arrays[f"all_outputs.{stage}.{name}"] = kernels.whole[name].numpy()
        arrays[f"spectrum.{stage}.{name}"] = ntk.spectrum(traced).numpy()
    return arrays


def _model_identity(setting: Setting) -> dict[str, Any]:
    model = setting.full
    return {
        "name": setting.config.model or DEFAULT_MODEL_NAME,
        "architecture": type(model).__name__,
        "pooling": pooling_of(model),
        "parameters": sum(p.numel() for p in model.parameters()),
        "scales": setting.number_of_scales,
    }


def _check(config: Config) -> None:
    degree = {} if config.degree is None else {"degree": config.degree}
    check_options(Method("propulsion", {"positions": list(config.positions)} | degree))


@contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    print(f"{step} ...", flush=True)
    start = time.time()
    yield
    seconds[step] = time.time() - start


ANALYSIS = Analysis(
    "kernel_distance", Config, find, summary,
    least={"n_examples": 2, "n_train": 1, "n_validation": 1, "null_draws": 1, "resamples": 1},
    above={"memory_budget_gb": 0},
    check=_check,
    # The seed of a cell is its own, as are task, rows and model.
    free=("task", "data_dir", "model", "training.seed", "seeds", "resamples", "memory_budget_gb"),
    about=lambda config: f"intervals: 95 %, {over_seeds(seeds_of(config), config.n_examples)}",
    finding=finding,
    variant=lambda config: f"-{config.task}",
)  # fmt: skip
run = ANALYSIS.run
