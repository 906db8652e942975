"""Does the law of LoRA's alignment predict the CKA at every rank, from the gradients alone?

At B = 0 the kernel of LoRA is random, by its matrix A. To leading order its CKA with the kernel of the same weights is
limit / sqrt(1 + c / r) at rank r, with both constants computed from the gradients of the weights and not fitted
(`ntk.lora_law`). Drawn kernels of each rank are compared with it.

    python -m analyses.lora_law --task sst2 --data-dir glue --n-examples 128 --output-dir results/lora_law/sst2

The same command resumes an interrupted run.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import tyro

import ntk
from analyses.core.analysis import Analysis, Findings, GridOutput, Runs
from analyses.core.intervals import LOGIT, mean_interval
from analyses.records import STAGES, Block, Metric, Result, interval, number, summary_of_blocks
from analyses.subjects.batch import held_out
from analyses.subjects.cost import memory_budget
from analyses.subjects.options import DataOptions
from analyses.subjects.readout import Readout
from analyses.subjects.training_run import dataset_identity
from ntk.adapters import LoRA
from ntk.low_rank_law import UNIFORM, LoRALaw
from propulsion.data import TaskData, load_task_data
from propulsion.identity import model_content
from propulsion.pretrained import fingerprint, pooling_of

COST = "five minutes a seed for MiniLM and 128 sentences"
STATED = 0.02
"""The error that is asked of the law."""


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
    ranks: tuple[int, ...] = (1, 2, 4, 16, 32, 64)
    """Ranks of LoRA on every linear layer."""
    draws: int = 5
    """Draws of LoRA's matrices A at each rank."""
    seeds: tuple[int, ...] = (0,)
    """Seeds, each with its own examples and head."""
    memory_budget_gb: float | None = None
    """Memory for features and kernels in GB; by default half of the free memory."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of the model and its kernels."""


def find(config: Config, runs: Runs) -> Findings | None:
    """Compute the law and the drawn kernels of every seed, or read them from their cells; None if some lack."""
    data = config.readout.rows(load_task_data(config.task, data_dir=config.data_dir))
    model = config.readout.load(config.model, num_labels=data.task.num_labels, seed=0, **config.loading)
    cells = runs.of(data, model_content(*model))
    each = [cells.cell(f"seed {seed}", partial(_measure, config, data), seed=seed) for seed in config.seeds]
    found = [cell for cell in each if cell is not None]
    if runs.missing:
        return None
    name = config.readout.name_of(config.model)
    laws = [LoRALaw(**cell["law"]) for cell in found]
    rows = []
    for rank in config.ranks:
        drawn = [value for cell in found for value in cell["drawn"][str(rank)]]
        mean = mean_interval([min(value, 1.0) for value in drawn], LOGIT) if len(drawn) > 1 else (drawn[0], None, None)
        predicted = float(np.mean([law.cka(rank) for law in laws]))
        rows.append({"rank": rank, "predicted": predicted, "measured": mean[0], "low": mean[1], "high": mean[2],
                     "error": predicted - mean[0]})  # fmt: skip
    return Findings(
        config={"model": config.model and name},
        metrics=[
            Metric("cka", row["measured"], row["low"], row["high"], "", STAGES[0], "full", f"LoRA, rank {row['rank']}")
            for row in rows
        ],
        tables={
            "ranks": rows,
            "laws": [{"seed": seed} | asdict(law) for seed, law in zip(config.seeds, laws, strict=True)],
        },
        model=found[0]["model"] | {"name": name},
        dataset=dataset_identity(data) | {"source": data.source},
        seconds={f"seed {seed}": cell["seconds"] for seed, cell in zip(config.seeds, found, strict=True)},
        coverage={"full": "linear layers of the backbone, without biases", "LoRA": "the same layers"},
    )  # fmt: skip


def _measure(config: Config, data: TaskData, *, seed: int) -> dict[str, Any]:
    """The law from the gradients of one seed, and the CKA of each draw with the kernel of the same weights."""
    started = time.time()
    model, tokenizer = config.readout.load(
        config.model, num_labels=data.task.num_labels, seed=seed, dtype=getattr(torch, config.dtype),
        device=config.device, **config.loading,
    )  # fmt: skip
    inputs, _ = held_out(data, tokenizer, config.n_examples, seed, device=config.device)
    output = ntk.outputs.margin() if config.readout.in_words else None
    with memory_budget(config.memory_budget_gb) as budget:
        layers = ntk.token_gradients(model, inputs, output=output, memory_budget=budget)
        full = torch.stack([each.kernel() for each in layers.values()]).sum(0)
        # peft's matrices have entries of variance 1 / (3 s), with s the length of the layer's input.
        weights = [1 / each.width for each in layers.values()]
        law = ntk.lora_law(list(layers.values()), weights=weights, excess_kurtosis=UNIFORM)
        print(f"the law from {len(layers)} layers in {time.time() - started:.0f} s", flush=True)
        chosen = frozenset(layers).__contains__
        del layers
        methods = {
            f"{rank}.{draw}": LoRA(rank=rank, modules=chosen, seed=draw)
            for rank in config.ranks
            for draw in range(config.draws)
        }
        kernels = ntk.adapter_kernels(
            model, inputs, methods, output=output, reduce="trace", memory_budget=budget, progress=True
        )
    print(f"{len(methods)} drawn kernels after {time.time() - started:.0f} s", flush=True)
    return {
        "law": asdict(law),
        "drawn": {
            str(rank): [ntk.cka(full, kernels[f"{rank}.{draw}"].double().cpu()) for draw in range(config.draws)]
            for rank in config.ranks
        },
        "seconds": time.time() - started,
        "model": {
            "name": config.readout.name_of(config.model),
            "architecture": type(model).__name__,
            "pooling": None if config.readout.in_words else pooling_of(model),
            "parameters": sum(p.numel() for p in model.parameters()),
            "fingerprint": fingerprint(model),
            "prompt": asdict(config.readout) if config.readout.in_words else None,
        },
        "arrays": {"full": full.cpu().numpy()},
    }


@summary_of_blocks
def summary(result: Result) -> Iterator[Block]:
    """The prediction and the measurement at each rank, and the constants of the law."""
    yield (
        ["rank", "predicted CKA", "measured CKA", "predicted − measured"],
        [
            [str(row["rank"]), number(row["predicted"]), interval(row["measured"], row["low"], row["high"]),
             f"{row['error']:+.3f}"]
            for row in result.tables["ranks"]
        ],
    )  # fmt: skip
    columns = ("limit", "constant", "size")
    yield (
        ["seed", "limit", "c", "size"],
        [[str(row["seed"]), *(number(row[column]) for column in columns)] for row in result.tables["laws"]],
    )


def missed(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """The ranks at which the law is further from the measured mean than `STATED`."""
    return [row["rank"] for row in rows if abs(row["error"]) > STATED]


def _said(result: Result) -> str:
    ranks = missed(result.tables["ranks"])
    worst = max(abs(row["error"]) for row in result.tables["ranks"])
    where = (
        f"more than {STATED} off at rank {', '.join(map(str, ranks))}" if ranks else f"within {STATED} at every rank"
    )
    return f"The law is {where}; the largest error is {number(worst)}."


ANALYSIS = Analysis(
    "lora_law", Config, find, summary,
    least={"n_examples": 3, "draws": 1, "ranks": 1},
    above={"memory_budget_gb": 0},
    free=("task", "data_dir", "model", "seeds", "memory_budget_gb"),
    about=lambda config: f"intervals: 95 %, Student's, {config.draws} draws of each of {len(config.seeds)} seeds",
    finding=_said,
    variant=lambda config: f"-{config.task}",
)  # fmt: skip
run = ANALYSIS.run

if __name__ == "__main__":
    ANALYSIS.command(__doc__)
