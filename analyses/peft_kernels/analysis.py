"""The configuration, measurements and result of the analysis: kernels of all methods, over seeds."""

import time
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

import ntk
from analyses.core.analysis import Analysis, Findings, GridOutput, Runs
from analyses.core.comparison import SeedComparison, draw_name, over_seeds
from analyses.parameter_count import width
from analyses.peft_kernels.layers import Place, agreement, place_methods, places_of
from analyses.peft_kernels.mean_split import mean_inputs, split_methods
from analyses.peft_kernels.measures import (
    LABELS,
    angle_table,
    degree_table,
    label_kernel,
    map_tables,
    method_metrics,
    split_metrics,
    split_table,
)
from analyses.peft_kernels.methods import FULL, REFERENCE, MethodChoice, methods_of, with_degree
from analyses.peft_kernels.tables import summary
from analyses.records import STAGES
from analyses.subjects.batch import held_out
from analyses.subjects.cost import memory_budget
from analyses.subjects.nulls import model_nulls
from analyses.subjects.options import DataOptions
from analyses.subjects.readout import Readout
from analyses.subjects.training_run import dataset_identity
from ntk.adapters import layers_of
from propulsion.data import TaskData, load_task_data
from propulsion.errors import UserError
from propulsion.identity import model_content
from propulsion.pretrained import fingerprint, pooling_of

STAGE = STAGES[0]


@dataclass(frozen=True)
class Config(DataOptions, GridOutput):
    """Options of the analysis."""

    task: str = "demo"
    """Task: demo (embedded, no network), or sst2, rte, cola, stsb, mrpc, qqp, mnli, qnli."""
    model: str | None = None
    """Name (`python -m propulsion.models` lists them), hub name, folder or GGUF file of a pre-trained model; by default
    minilm, the packaged MiniLM-L6 encoder."""
    readout: tyro.conf.OmitArgPrefixes[Readout] = field(default_factory=Readout)
    """The differentiated outputs: those of a classifier's new head, or the difference of two label words' logits."""
    n_examples: int = 24
    """Held-out examples that the kernels of each seed are computed on."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds, each with its own examples, head, random matrices and null models."""
    methods: tyro.conf.OmitArgPrefixes[MethodChoice] = field(default_factory=MethodChoice)
    """Methods whose kernels are computed."""
    top: int = 8
    """Number of leading eigenvectors that the overlap of eigenspaces compares."""
    null_draws: int = 3
    """Draws of each random null model, in each seed."""
    resamples: int = 200
    """Bootstrap resamples behind each interval of a single seed."""
    memory_budget_gb: float | None = None
    """Memory for features and kernels in GB; by default half of the free memory."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of the model and its kernels."""

    @property
    def model_name(self) -> str:
        """The model's name without its folder."""
        return self.readout.name_of(self.model)


def find(config: Config, runs: Runs) -> Findings | None:
    """Compute the kernels of every seed, or read them from their stored cells, and compare them; None if some lack."""
    data = config.readout.rows(load_task_data(config.task, data_dir=config.data_dir))
    model = config.readout.load(config.model, num_labels=data.task.num_labels, seed=0, **config.loading)
    cells = runs.of(data, model_content(*model))
    each = [cells.cell(f"seed {seed}", partial(_measure, config, data), seed=seed) for seed in config.seeds]
    found = [cell for cell in each if cell is not None]
    if runs.missing:
        return None
    kernels = [_with_labels(cell["arrays"], regression=data.task.is_regression) for cell in found]
    comparison = SeedComparison(kernels, config.seeds, STAGE, config.resamples)
    first = found[0]
    names, places = first["methods"], [Place.of(row) for row in first["places"]]
    measured = time.time()
    metrics = method_metrics(comparison, names, config.top)
    metrics += comparison.nulls(FULL, first["nulls"])
    metrics += split_metrics(comparison)
    degrees = [with_degree(k) for k in config.methods.degrees]
    shown = [name for name in names if name not in degrees]
    tables = {
        "methods": [{"method": name} for name in shown],
        "left_out": [{"method": name, "reason": why} for name, why in first["left_out"].items()],
        "nulls": [{"null": null} for null in first["nulls"]],
        "split": split_table(metrics),
        "degree": degree_table(comparison, config.methods.degrees),
        "principal_angles": angle_table(comparison, shown[1:], config.top),
        "layers": agreement(places, comparison),
        **map_tables(comparison, shown),
        "seed_values": comparison.values,
    }
    return Findings(
        config={"model": config.model and config.model_name},
        metrics=metrics,
        tables=tables,
        # Only the kernels and labels of the first seed are stored in the result; the cells keep those of all seeds.
        arrays={LABELS: first["arrays"][LABELS]}
        | {f"{STAGE}.{name}": first["arrays"][name] for name in (*names, *first["parts"])},
        # A cell may be of the same model in another folder: the name is that of this call.
        model=first["model"] | {"name": config.model_name},
        dataset=dataset_identity(data) | {"source": data.source},
        seconds={
            **{f"seed {seed}": cell["seconds"] for seed, cell in zip(config.seeds, found, strict=True)},
            "comparison": time.time() - measured,
        },
        coverage={name: "the backbone, without the head" for name in names}
        | {name: "linear layers of the backbone" for name in first["parts"]},
    )


def _measure(config: Config, data: TaskData, *, seed: int) -> dict[str, Any]:
    """All kernels of one seed, traced over the outputs, by name."""
    started, seconds = time.time(), {}
    dtype = getattr(torch, config.dtype)
    model, tokenizer = config.readout.load(
        config.model, num_labels=data.task.num_labels, seed=seed, dtype=dtype, device=config.device,
        **config.loading,
    )  # fmt: skip
    inputs, labels = held_out(data, tokenizer, config.n_examples, seed, device=config.device)
    output = ntk.outputs.margin() if config.readout.in_words else None
    methods, left_out = methods_of(model, config.methods, seed)
    places = places_of(model)
    parts = {f"linear: {name}": m for name, m in split_methods(mean_inputs(model, inputs)).items()}
    with memory_budget(config.memory_budget_gb) as budget:
        whole = ntk.adapter_kernels(
            model, inputs, methods | place_methods(places) | parts, output=output,
            memory_budget=budget, progress=True,
        )  # fmt: skip
    full = whole[FULL].cpu()
    kernels = {name: ntk.reduce_outputs(kernel, "trace").cpu() for name, kernel in whole.items()}
    del whole
    seconds["kernels"] = time.time() - started
    scales = sum(width(layer) or 0 for layer in layers_of(model).values())
    nulls = model_nulls(
        model, inputs, full, kernels[REFERENCE], scales, draws=config.null_draws, seed=seed,
        output=output,
    )  # fmt: skip
    for null, draws in nulls.items():
        kernels |= {draw_name(null, i): kernel for i, kernel in enumerate(draws)}
    seconds["with null models"] = time.time() - started
    print(f"{len(kernels)} kernels in {time.time() - started:.0f} s", flush=True)
    return {
        "methods": list(methods),
        "left_out": left_out,
        "places": [asdict(place) for place in places],
        "parts": list(parts),
        "nulls": {null: len(draws) for null, draws in nulls.items()},
        "seconds": seconds,
        "model": {
            "name": config.model_name,
            "architecture": type(model).__name__,
            "pooling": None if config.readout.in_words else pooling_of(model),
            "parameters": sum(p.numel() for p in model.parameters()),
            "scales": scales,
            "fingerprint": fingerprint(model),
            "prompt": asdict(config.readout) if config.readout.in_words else None,
        },
        "arrays": {LABELS: labels} | {name: kernel.numpy() for name, kernel in kernels.items()},
    }


def _with_labels(arrays: dict[str, np.ndarray], *, regression: bool) -> dict[str, Tensor]:
    """The kernels of one seed in float64, together with the kernel of the labels."""
    kernels = {name: torch.from_numpy(array).double() for name, array in arrays.items() if name != LABELS}
    return kernels | {LABELS: label_kernel(arrays[LABELS], regression=regression)}


def _check(config: Config) -> None:
    if config.top > config.n_examples:
        raise UserError(f"top must be between 1 and the {config.n_examples} examples; got {config.top}")
    config.methods.check()


ANALYSIS = Analysis(
    "peft_kernels", Config, find, summary,
    least={"n_examples": 2, "null_draws": 1, "resamples": 1, "top": 1},
    above={"memory_budget_gb": 0},
    check=_check,
    # The seed of a cell is its own, as are task, rows and model.
    free=("task", "data_dir", "model", "seeds", "top", "resamples", "memory_budget_gb"),
    about=lambda config: f"intervals: 95 %, {over_seeds(config.seeds, config.n_examples)}",
    variant=lambda config: f"-{config.task}",
)  # fmt: skip
run = ANALYSIS.run
