"""Why does Propulsion's kernel differ from full fine-tuning's: because of the weights, or because of the coordinates?

Every linear layer of a pre-trained model's body has three kernels at initialisation: F of the weight, M of a whole
matrix on the layer's outputs, and P of Propulsion's scales (`ntk.decomposition`). F and M differ by the anisotropy of
the weight, M and P by the choice of coordinates. The control for the second is Propulsion in a random orthogonal basis
of the outputs.

    python -m analyses.decomposition --task sst2 --data-dir glue --n-examples 128 --output-dir results/decomposition

The same command resumes an interrupted run.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

import ntk
from analyses.core.analysis import Analysis, Findings, GridOutput, Runs
from analyses.core.comparison import defined
from analyses.core.intervals import LOG, LOGIT, Scale, mean_interval
from analyses.peft_kernels.layers import KINDS, Place, label_of, places_of
from analyses.records import STAGES, Block, Metric, Result, interval, number, summary_of_blocks
from analyses.subjects.batch import held_out
from analyses.subjects.cost import memory_budget
from analyses.subjects.options import DataOptions
from analyses.subjects.readout import Readout
from analyses.subjects.training_run import dataset_identity
from ntk.adapters import Propulsion
from ntk.certificates import distance_interval
from propulsion.data import TaskData, load_task_data
from propulsion.identity import model_content
from propulsion.pretrained import fingerprint, pooling_of

COST = "two minutes a seed for MiniLM and 128 sentences"
STAGE = STAGES[0]
ALL = "all linear layers"
FULL, METRIC, SCALES, ROTATED = "full", "output matrix", "Propulsion", "Propulsion, rotated"
PAIRS = {"full_metric": (FULL, METRIC), "metric_scales": (METRIC, SCALES), "full_scales": (FULL, SCALES),
         "metric_rotated": (METRIC, ROTATED)}  # fmt: skip
"""Columns of the tables -> the two kernels whose CKA they hold."""


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
    """Seeds, each with its own examples, head, rotations and permutations."""
    null_draws: int = 10
    """Permutations of the examples, for the null model."""
    memory_budget_gb: float | None = None
    """Memory for features and kernels in GB; by default half of the free memory."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of the model and its kernels."""


def find(config: Config, runs: Runs) -> Findings | None:
    """Compute the kernels of every seed, or read them from their stored cells, and compare them; None if some lack."""
    data = config.readout.rows(load_task_data(config.task, data_dir=config.data_dir))
    model = config.readout.load(config.model, num_labels=data.task.num_labels, seed=0, **config.loading)
    cells = runs.of(data, model_content(*model))
    each = [cells.cell(f"seed {seed}", partial(_measure, config, data), seed=seed) for seed in config.seeds]
    found = [cell for cell in each if cell is not None]
    if runs.missing:
        return None
    name, first = config.readout.name_of(config.model), found[0]
    places = [Place.of(row) for row in first["places"]]
    groups = _groups(places)
    measured = [_measures(config, cell, groups, seed) for cell, seed in zip(found, config.seeds, strict=True)]
    rows = [_row(label, places, [one[label] for one in measured]) for label in groups]
    return Findings(
        config={"model": config.model and name},
        metrics=[metric for row in rows for metric in _metrics(row)],
        tables={"groups": rows, "seed_values": [
            {"seed": seed, "group": label} | values
            for seed, one in zip(config.seeds, measured, strict=True) for label, values in one.items()
        ]},
        # Only the sums over all layers of the first seed are stored in the result; the cells keep every layer's.
        arrays={f"{STAGE}.{part}": np.asarray(_summed(first, part, groups[ALL]).float())
                for part in (FULL, METRIC, SCALES, ROTATED)},
        model=first["model"] | {"name": name},
        dataset=dataset_identity(data) | {"source": data.source},
        seconds={f"seed {seed}": cell["seconds"] for seed, cell in zip(config.seeds, found, strict=True)},
        coverage={part: "linear layers of the backbone, without biases" for part in (FULL, METRIC, SCALES, ROTATED)},
    )  # fmt: skip


def _measure(config: Config, data: TaskData, *, seed: int) -> dict[str, Any]:
    """The four kernels of every place in one seed, traced over the outputs."""
    started = time.time()
    model, tokenizer = config.readout.load(
        config.model, num_labels=data.task.num_labels, seed=seed, dtype=getattr(torch, config.dtype),
        device=config.device, **config.loading,
    )  # fmt: skip
    inputs, _ = held_out(data, tokenizer, config.n_examples, seed, device=config.device)
    output = ntk.outputs.margin() if config.readout.in_words else None
    with memory_budget(config.memory_budget_gb) as budget:
        options = {"output": output, "reduce": "trace", "memory_budget": budget, "progress": True}
        layers = {k: v for k, v in ntk.decomposition(model, inputs, **options).items() if v.full.any()}
        rotated = ntk.adapter_kernels(
            model, inputs,
            {k: Propulsion(modules=frozenset([k]).__contains__, basis="rotated", seed=seed) for k in layers},
            **options,
        )  # fmt: skip
    places, arrays, sizes = [], {}, {}
    for place in places_of(model):
        names = [module for module in place.modules if module in layers]
        if not names:
            continue
        places.append(asdict(place) | {"modules": names})
        kernels = {
            FULL: [layers[name].full for name in names], METRIC: [layers[name].metric for name in names],
            SCALES: [layers[name].propulsion for name in names], ROTATED: [rotated[name] for name in names],
        }  # fmt: skip
        arrays |= {f"{part}: {place.label}": torch.stack(k).sum(0).cpu().numpy() for part, k in kernels.items()}
        sizes[place.label] = sum(
            float(model.get_submodule(name).weight.detach().square().mean() * layers[name].full.trace())
            for name in names
        )
    print(f"kernels of {len(layers)} layers in {time.time() - started:.0f} s", flush=True)
    return {
        "places": places,
        "scaled_traces": sizes,
        "seconds": time.time() - started,
        "model": {
            "name": config.readout.name_of(config.model),
            "architecture": type(model).__name__,
            "pooling": None if config.readout.in_words else pooling_of(model),
            "parameters": sum(p.numel() for p in model.parameters()),
            "fingerprint": fingerprint(model),
            "prompt": asdict(config.readout) if config.readout.in_words else None,
        },
        "arrays": arrays,
    }


def _groups(places: Sequence[Place]) -> dict[str, list[str]]:
    """Labels of the groups whose kernels are compared -> labels of the places that they sum."""
    labels = [place.label for place in places]
    kinds = {kind: [p.label for p in places if p.kind == kind and p.block is not None] for kind in KINDS}
    return {label: [label] for label in labels} | {k: held for k, held in kinds.items() if held} | {ALL: labels}


def _summed(cell: Mapping[str, Any], part: str, labels: Sequence[str]) -> Tensor:
    """The kernel of a group, a sum over its places, in float64."""
    return torch.stack([torch.from_numpy(cell["arrays"][f"{part}: {label}"]).double() for label in labels]).sum(0)


def _measures(
    config: Config, cell: Mapping[str, Any], groups: Mapping[str, Sequence[str]], seed: int
) -> dict[str, dict[str, float]]:
    """Every number of every group in one seed; not a number where a kernel is zero, or constant over the examples."""
    found = {}
    whole = float(_summed(cell, FULL, groups[ALL]).trace())
    for label, labels in groups.items():
        kernels = {part: _summed(cell, part, labels) for part in (FULL, METRIC, SCALES, ROTATED)}
        traces = {part: float(kernel.trace()) for part, kernel in kernels.items()}
        generator = torch.Generator().manual_seed(seed)
        null = [
            defined(ntk.cka, kernels[FULL], ntk.nulls.permuted(kernels[SCALES], generator=generator))
            for _ in range(config.null_draws)
        ]
        values = {column: defined(ntk.cka, kernels[a], kernels[b]) for column, (a, b) in PAIRS.items()}
        found[label] = values | {
            "permuted": float(np.mean(null)),
            "directions": _directions(kernels[FULL], values["full_scales"]),
            "metric_ratio": _ratio(traces[METRIC], sum(cell["scaled_traces"][each] for each in labels)),
            "scales_ratio": _ratio(traces[SCALES], traces[METRIC]),
            "share": _ratio(traces[FULL], whole),
        }
    return found


def _directions(full: Tensor, alignment: float) -> float:
    return math.nan if math.isnan(alignment) else ntk.equivalent_directions(full, min(alignment, 1.0))


def _ratio(above: float, below: float) -> float:
    return above / below if below else math.nan


_SCALES: dict[str, Scale] = dict.fromkeys((*PAIRS, "permuted", "share"), LOGIT) | dict.fromkeys(
    ("directions", "metric_ratio", "scales_ratio"), LOG
)


def _row(label: str, places: Sequence[Place], each: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Means over seeds, with the ends of Student's intervals in columns with ``_low`` and ``_high``."""
    place = next((p for p in places if p.label == label), None)
    row: dict[str, Any] = {"group": label, "kind": place and place.kind, "block": place and place.block,
                           "layers": place and len(place.modules)}  # fmt: skip
    for column, scale in _SCALES.items():
        values = [min(one[column], 1.0) if scale is LOGIT else one[column] for one in each]
        found = mean_interval(values, scale) if np.isfinite(values).all() else (float("nan"),) * 3
        row |= dict(zip((column, f"{column}_low", f"{column}_high"), map(_finite, found), strict=True))
    return row


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _metrics(row: Mapping[str, Any]) -> Iterator[Metric]:
    for column, (left, right) in PAIRS.items():
        value = float("nan") if row[column] is None else row[column]
        ends = row[f"{column}_low"], row[f"{column}_high"]
        yield Metric("cka", value, *ends, "", STAGE, f"{left}: {row['group']}", f"{right}: {row['group']}")


@summary_of_blocks
def summary(result: Result) -> Iterator[Block]:
    """Three tables by kind of layer and of all layers, and one layer by layer."""
    rows = result.tables["groups"]

    def cells(row: Mapping[str, Any], *columns: str) -> list[str]:
        return [interval(row[c], row[f"{c}_low"], row[f"{c}_high"]) for c in columns]

    header = ["CKA, F and M", "M and P", "F and P", "random directions", "M and rotated P", "F and permuted P"]
    columns = (*list(PAIRS)[:3], "directions", "metric_rotated", "permuted")
    whole = [row for row in rows if row["kind"] is None or row["block"] is None]
    yield ["by kind", *header], [[row["group"], *cells(row, *columns)] for row in whole]
    sizes = ("share", "metric_ratio", "scales_ratio")
    yield (
        ["by kind", "share of tr F", "tr M / (σ² tr F)", "tr P / tr M"],
        [[row["group"], *cells(row, *sizes)] for row in whole],
    )
    yield (
        ["by kind", "distance of F and P after the best scale", "at least, by the two steps", "at most"],
        [[row["group"], *map(number, _certified(result, row["group"]))] for row in whole],
    )
    yield (
        ["by layer", "CKA, F and M", "M and P", "F and P", "tr M / (σ² tr F)", "tr P / tr M"],
        [
            [label_of(row["kind"], row["block"]), *(number(row[c]) for c in (*list(PAIRS)[:3], *sizes[1:]))]
            for row in rows
            if row["block"] is not None
        ],
    )


def _certified(result: Result, group: str) -> tuple[float, float, float]:
    """The distance of the centred kernels F and P after the best scale, and the interval that the CKA of F and M and of
    M and P prove for it; means over seeds.
    """
    rows = [row for row in result.tables["seed_values"] if row["group"] == group]
    each = []
    for row in rows:
        full_metric, metric_scales, full_scales = (min(row[column], 1.0) for column in list(PAIRS)[:3])
        each.append((math.sqrt(1 - full_scales**2), *distance_interval(full_metric, metric_scales)))
    distance, low, high = np.mean(each, axis=0)
    return float(distance), float(low), float(high)


def _said(result: Result) -> str:
    row = next(row for row in result.tables["groups"] if row["group"] == ALL)
    f_m, m_p, f_p = (number(row[c]) for c in list(PAIRS)[:3])
    return (
        f"All linear layers together: CKA {f_m} of the weights with a matrix on the outputs, {m_p} of that with "
        f"Propulsion, {f_p} of the weights with Propulsion."
    )


ANALYSIS = Analysis(
    "decomposition", Config, find, summary,
    least={"n_examples": 3, "null_draws": 1},
    above={"memory_budget_gb": 0},
    # The seed of a cell is its own, as are task, rows and model.
    free=("task", "data_dir", "model", "seeds", "null_draws", "memory_budget_gb"),
    about=lambda config: f"intervals: 95 %, Student's, {len(config.seeds)} seeds",
    finding=_said,
    variant=lambda config: f"-{config.task}",
)  # fmt: skip
run = ANALYSIS.run

if __name__ == "__main__":
    ANALYSIS.command(__doc__)
