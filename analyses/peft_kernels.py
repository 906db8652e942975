"""The kernels of parameter-efficient methods beside full fine-tuning's, on one pre-trained model and task.

At initialisation, the head left out: how close each method's kernel is to that of the whole backbone (direction, size,
top eigenspaces, alignment with the labels), what null models reach, and what is left of the agreement once the mean
activation is taken out of every linear layer's input (`analyses.common_component`). Kernels are traced over the
outputs, in standard parametrisation.

    python -m analyses.peft_kernels --task sst2 --data-dir DIR --output-dir results/peft_kernels
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn

import ntk
from analyses.bootstrap import bootstrap_interval
from analyses.common_component import PARTS, mean_inputs, split_methods
from analyses.comparison import KERNEL_METRICS, PAIR_METRICS, Comparison, null_kernels
from analyses.model_kernels import is_backbone
from analyses.peft_kernels_tables import summary
from analyses.results import STAGES, Metric, Result, check_writable, environment, write_result
from ntk.adapters import (
    IA3,
    BitFit,
    DoRA,
    Found,
    Full,
    Layer,
    LoHa,
    LoRA,
    Method,
    NormTuning,
    Propulsion,
    RandomSubset,
    VeRA,
    kaiming_uniform,
    layers_of,
)  # fmt: skip
from propulsion.data import draw_rows, load_task_data, tokenize
from propulsion.errors import UserError, run_command
from propulsion.positions import resolve
from propulsion.pretrained import load_classifier

DTYPES = {"float32": torch.float32, "float64": torch.float64}
FULL, REFERENCE = "full fine-tuning", "Propulsion"
STAGE = STAGES[0]
# Of the metrics of a pair, those that an overview of many methods has room for.
_METRICS = ("alignment", "cka", "trace_ratio")


@dataclass(frozen=True)
class Config:
    """Kernels of parameter-efficient methods beside full fine-tuning's."""

    task: str = "demo"
    """Task: demo (embedded, no network), or sst2, rte, cola, stsb, mrpc, qqp, mnli, qnli."""
    data_dir: Path | None = None
    """Folder with train and validation files (.jsonl, .csv, .tsv, .parquet) in GLUE's columns; else the hub."""
    model: str | None = None
    """Hub name or folder of a pre-trained model; by default the packaged MiniLM-L6 encoder."""
    n_examples: int = 24
    """Held-out examples that the kernels are computed on."""
    positions: tuple[str, ...] = ("attn", "mlp", "embedding", "query", "key", "value", "attention_output")
    """Propulsion on these layers alone, beside Propulsion on all; positions that a model lacks are an error."""
    ia3_positions: tuple[str, ...] = ("key", "value")
    """Layers whose outputs (IA)³ scales; none leaves it out."""
    degree: float = 15.0
    """A degree of Propulsion beside 1, to show that it changes the size of the kernel alone."""
    ranks: tuple[int, ...] = (1, 8, 64)
    """Ranks of LoRA; LoHa and DoRA take the middle one."""
    vera_rank: int = 256
    """Rank of VeRA's shared matrices."""
    subset: int = 384
    """Weights of each layer that the random subset trains."""
    top: int = 8
    """How many leading eigenvectors the overlap of eigenspaces compares."""
    null_draws: int = 3
    """Draws of each random null model."""
    resamples: int = 200
    """Bootstrap resamples behind each interval."""
    seed: int = 0
    """Of the examples, the head, random matrices, null models and resamples."""
    memory_budget_gb: float | None = None
    """Memory for features and kernels in GB; by default half of what is free."""
    output_dir: Path | None = None
    """Result folder; by default results/peft_kernels-TASK."""
    overwrite: bool = False
    """Replace an earlier result in that folder."""
    device: str = "cpu"
    """Torch device, such as cpu or cuda."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of the model and its kernels."""


@dataclass(frozen=True)
class Backbone(Method):
    """A method kept away from the parameters of the head.

    Attributes:
        method: the method.
        prefix: of the backbone's parameters.
    """

    method: Method
    prefix: str

    def share(self, name: str, parameter: Tensor, module: nn.Module, layer: str | None) -> float:
        """The method's own, in the backbone."""
        return self.method.share(name, parameter, module, layer) if name.startswith(self.prefix) else 0.0

    def adapts(self, module: str) -> bool:
        """As the method does."""
        return self.method.adapts(module)

    def features(self, layer: Layer) -> Found:
        """The method's own."""
        return self.method.features(layer)


def methods_of(model: Any, config: Config) -> dict[str, Method]:
    """Every method by its name in tables and figures, full fine-tuning first.

    Raises:
        UserError: the model has no layer at a position.
    """
    linear: dict[str, Any] = {n: m for (_, reads), (n, m) in layers_of(model).items() if not reads}

    def at(*positions: str) -> Callable[[str], bool]:
        try:
            return resolve(model, positions).__contains__
        except ValueError as error:
            raise UserError(str(error)) from error

    longest = max(max(m.weight.shape) for m in linear.values())
    rank = sorted(config.ranks)[len(config.ranks) // 2]
    seed, names = config.seed, linear.__contains__
    vera = VeRA(
        a=kaiming_uniform((config.vera_rank, longest), f"{seed}.vera.a"),
        b=kaiming_uniform((longest, config.vera_rank), f"{seed}.vera.b"),
        modules=names,
    )
    found: dict[str, Method] = {
        FULL: Full(),
        REFERENCE: Propulsion(modules=at("all")),
        f"Propulsion, degree {config.degree:g}": Propulsion(config.degree, at("all")),
        **{f"Propulsion, {p}": Propulsion(modules=at(p)) for p in config.positions},
        "BitFit": BitFit(),
        "norm tuning": NormTuning(),
        **({"(IA)³": IA3(at(*config.ia3_positions))} if config.ia3_positions else {}),
        **{f"LoRA, rank {r}": LoRA(rank=r, modules=names, seed=seed) for r in config.ranks},
        f"DoRA, rank {rank}": DoRA(rank=rank, modules=names, seed=seed),
        f"VeRA, rank {config.vera_rank}": vera,
        f"LoHa, rank {rank}": LoHa(rank=rank, modules=names, seed=seed),
        f"{config.subset} weights a layer": RandomSubset(config.subset, names, seed),
    }
    prefix = f"{model.base_model_prefix}."
    return {name: Backbone(method, prefix) for name, method in found.items()}


def run(config: Config) -> Result:
    """Measure every kernel once and compare them; everything random follows ``config.seed``.

    Raises:
        UserError: unusable data, model or options, or more memory needed than there is.
    """
    _check(config)
    started, seconds = time.time(), {}
    data = load_task_data(config.task, data_dir=config.data_dir, seed=config.seed)
    model, tokenizer = load_classifier(
        config.model, num_labels=data.task.num_labels, seed=config.seed, dtype=DTYPES[config.dtype],
        device=config.device,
    )  # fmt: skip
    drawn = draw_rows(data.validation, data.task, config.n_examples, config.seed)
    rows = tokenize(drawn, tokenizer, data.task)
    columns = {name: rows[name] for name in rows.column_names if name != "labels"}
    inputs = {name: v.to(config.device) for name, v in tokenizer.pad(columns, return_tensors="pt").items()}
    labels = np.asarray(drawn["label"])
    methods = methods_of(model, config)
    budget = None if config.memory_budget_gb is None else config.memory_budget_gb * 1e9
    kernels_of = partial(ntk.adapter_kernels, model, inputs, memory_budget=budget, progress=True)
    try:
        whole = {name: k.cpu() for name, k in kernels_of(methods).items()}
        split = kernels_of(split_methods(mean_inputs(model, inputs)), reduce="trace")
    except MemoryError as error:
        raise UserError(f"{error} (--n-examples, --memory-budget-gb)") from error
    traced = {name: ntk.reduce_outputs(k, "trace") for name, k in whole.items()}
    parts = {f"linear: {name}": k.cpu() for name, k in split.items()}
    scales = sum(
        p.numel() for p in (_vector(m, reads) for (_, reads), (_, m) in layers_of(model).items())
    )  # m, the entries of z on every layer
    seconds["kernels"] = time.time() - started
    print(f"kernels of {len(methods)} methods and {len(parts)} parts in {seconds['kernels']:.0f} s", flush=True)
    nulls = _null_models(config, model, inputs, whole[FULL], traced[REFERENCE], scales)
    seconds["with null models"] = time.time() - started
    metrics = _comparisons(config, traced, label_kernel(labels, regression=data.task.is_regression))
    comparison = Comparison(traced, STAGE, config.resamples, config.seed)
    metrics += [metric for null, draws in nulls.items() for metric in comparison.null(FULL, null, draws)]
    metrics += _split_metrics(config, parts)
    names = list(methods)
    seconds["total"] = time.time() - started
    return Result(
        analysis="peft_kernels",
        config=asdict(config),
        seed=config.seed,
        metrics=metrics,
        tables={
            "methods": [{"method": name} for name in names],
            "nulls": [{"null": null} for null in nulls],
            "split": split_table(parts),
            "principal_angles": [_angles(config, name, traced) for name in names[1:]],
            "similarity": [
                {"left": a, "right": b, "cka": _or_nan(ntk.cka, traced[a], traced[b])} for a in names for b in names
            ],
        },
        arrays={"labels": labels} | {f"{STAGE}.{name}": k.numpy() for name, k in (traced | parts).items()},
        model={
            "name": config.model or "MiniLM-L6 (packaged)",
            "architecture": type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "scales": scales,
        },
        dataset={
            "name": data.task.name,
            "task": data.task.name,
            "label_names": None if data.task.is_regression else list(data.task.label_names),
            "source": data.source,
            "fingerprint": data.fingerprint,
        },
        environment=environment(),
        seconds=seconds,
        coverage={name: "the backbone, without the head" for name in names}
        | {name: "linear layers of the backbone" for name in parts},
    )


def label_kernel(labels: np.ndarray, *, regression: bool) -> Tensor:
    """The kernel of the labels: whether two classes are equal, or the product of two values."""
    y = torch.from_numpy(labels).double()
    return y[:, None] * y if regression else (y[:, None] == y).double()


def split_table(parts: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Shares of the trace of the common and the residual part, which cross terms complete to 1."""
    table = []
    for name in ("full", "Propulsion"):
        total = ntk.trace(parts[f"linear: {name}, whole"])
        shares = {part: ntk.trace(parts[f"linear: {name}, {part}"]) / total for part in PARTS[1:]}
        table.append({"kernel": name, **shares, "cross": 1 - sum(shares.values())})
    return table


def _vector(module: Any, reads: bool) -> Tensor:
    """A vector of the length of a layer's output."""
    weight = module.weight
    transposed = reads or type(module).__name__ == "Conv1D"
    return weight[0] if transposed else weight[:, 0]


def _null_models(
    config: Config, model: Any, inputs: dict[str, Tensor], full: Tensor, adapter: Tensor, m: int
) -> dict[str, list[Tensor]]:
    """Kernels that know nothing of any method, with as many parameters as Propulsion has."""
    generator = torch.Generator().manual_seed(config.seed)
    nulls = null_kernels(full, adapter, m, draws=config.null_draws, generator=generator)
    subsets = ntk.random_subset_ntk(
        model, inputs, m, generator=generator, params=lambda name, p: is_backbone(model, name), reduce="trace",
        draws=config.null_draws, progress=True,
    )  # fmt: skip
    nulls[f"random subset of {m:,} weights"] = [kernel.cpu() for kernel in subsets]
    nulls["last hidden states"] = [ntk.hidden_state_kernel(model, inputs).cpu()]
    return nulls


def _comparisons(config: Config, kernels: dict[str, Tensor], labels: Tensor) -> list[Metric]:
    """Every method against full fine-tuning, alone, and against the labels."""
    metrics = []

    def measure(name: str, function: Callable[..., float], unit: str, left: str, right: str, *of: Tensor) -> None:
        found = bootstrap_interval(function, of, resamples=config.resamples, seed=config.seed)
        metrics.append(Metric(name, *found, unit, STAGE, left, right))

    overlap = partial(ntk.eigenspace_overlap, rank=config.top)
    full = kernels[FULL]
    for name, kernel in kernels.items():
        for metric, (function, unit) in KERNEL_METRICS.items():
            measure(metric, function, unit, name, "", kernel)
        measure("label_cka", ntk.cka, "", name, "labels", kernel, labels)
        if name == FULL:
            continue
        for metric in _METRICS:
            measure(metric, *PAIR_METRICS[metric], FULL, name, full, kernel)
        measure("eigenspace_overlap", overlap, "", FULL, name, full, kernel)
        if name.startswith(REFERENCE) and "degree" not in name:
            measure("k_star", ntk.matching_degree, "", FULL, name, full, kernel)
    return metrics


def _split_metrics(config: Config, parts: dict[str, Tensor]) -> list[Metric]:
    """How well Propulsion and BitFit follow full fine-tuning of the same layers: whole, common part, residual."""
    comparison = Comparison(parts, STAGE, config.resamples, config.seed)
    metrics = []
    for part in PARTS:
        for other in (f"Propulsion, {part}", "BitFit"):
            pair = comparison.pair(f"linear: full, {part}", f"linear: {other}")
            metrics += [metric for metric in pair if metric.name in _METRICS]
    return metrics


def _angles(config: Config, name: str, kernels: dict[str, Tensor]) -> dict[str, Any]:
    try:
        angles = ntk.principal_angles(kernels[FULL], kernels[name], config.top).rad2deg().tolist()
    except ntk.UndefinedMetricError:
        angles = None
    return {"method": name, "degrees": angles}


def _or_nan(metric: Callable[..., float], *kernels: Tensor) -> float:
    try:
        return metric(*kernels)
    except ntk.UndefinedMetricError:
        return float("nan")


def _check(config: Config) -> None:
    for name, least in (("n_examples", 2), ("null_draws", 1), ("resamples", 1), ("vera_rank", 1), ("subset", 1)):
        if getattr(config, name) < least:
            raise UserError(f"{name} must be at least {least}; got {getattr(config, name)}")
    if not 1 <= config.top <= config.n_examples:
        raise UserError(f"top must be between 1 and the {config.n_examples} examples; got {config.top}")
    if not config.ranks or min(config.ranks) < 1:
        raise UserError(f"ranks must be one or more numbers of at least 1; got {config.ranks}")
    if config.memory_budget_gb is not None and config.memory_budget_gb <= 0:
        raise UserError(f"memory_budget_gb must be positive; got {config.memory_budget_gb}")


def main(config: Config) -> None:
    """Run, print, write the result folder, draw the figure."""
    config = replace(config, output_dir=config.output_dir or Path("results") / f"peft_kernels-{config.task}")
    assert config.output_dir is not None
    check_writable(config.output_dir, overwrite=config.overwrite)
    result = run(config)
    print(f"\n{summary(result)}\n")
    # Figures read results; only this last step of a command knows of them.
    from figures.peft_kernels import write as draw

    folder = write_result(result, config.output_dir, figures=draw, overwrite=config.overwrite)
    print(f"intervals: 95 %, bootstrap over {config.n_examples} examples; result and figures in {folder}")


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Config, prog="python -m analyses.peft_kernels", description=__doc__)))
