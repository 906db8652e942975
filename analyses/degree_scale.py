"""How much larger is full fine-tuning's kernel than Propulsion's, and at which degree are they equally large?

At z = 1 Propulsion's kernel is proportional to k squared, so that at the degree k* = sqrt(tr K_F / tr K_P(1)) both
kernels have the same trace. k* is measured for random networks of several widths and depths in standard
parametrisation, for architectures with random weights, and for a pre-trained encoder. It is compared with the degrees
that the paper found best, and with its value at random weights, where a layer's kernels differ by the variance of its
weights' entries, so that k* is about 1 / their standard deviation.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from torch import Tensor

import ntk
from analyses.core.analysis import Analysis, Findings, Output
from analyses.records import Block, Metric, Result, interval, number, summary_of_blocks
from analyses.subjects.batch import held_out
from analyses.subjects.options import model_identity
from analyses.subjects.parameters import backbone_prefix, backbone_tuning, is_backbone
from ntk.adapters import Propulsion
from ntk.infinite import mlp_kernels
from ntk.infinite.networks import MLP, Recipe, is_multiplier
from propulsion.data import RowOptions, TaskData, check_folders, load_task_data
from propulsion.data.tasks import get_labelled_task
from propulsion.errors import UserError
from propulsion.pretrained import Pooling, find_config, load_classifier
from propulsion.pretrained.options import LoadingOptions

COST = "a minute"

# In the paper's ablation (Kowsher, Prottasha and Bhat 2024, App. E) accuracy peaks at degrees in this range.
PAPER_BEST = (25, 75)


@dataclass(frozen=True)
class Config(LoadingOptions, RowOptions, Output):
    """Options of the analysis."""

    widths: tuple[int, ...] = (32, 64, 128, 256, 512)
    """Widths of the random networks."""
    depths: tuple[int, ...] = (1, 2, 4, 8)
    """Depths of the random networks."""
    draws: int = 5
    """Random networks of each size."""
    n_examples: int = 32
    """Held-out sentences of each task for the pre-trained models."""
    tasks: tuple[str, ...] = ("demo",)
    """Tasks whose sentences the pre-trained models read."""
    models: tuple[str, ...] = ()
    """Pre-trained models besides the packaged encoder, by hub name or folder."""
    pooling: Pooling = "auto"
    """How a new head pools hidden states: mean; first; pooler, as transformers does; auto, as its checkpoint says."""
    seed: int = 0
    """Seed of the inputs, networks and heads."""


def mlp_rows(config: Config) -> Iterator[dict[str, Any]]:
    """Yield rows of random ReLU networks: every width at the second depth, and every depth at the middle width."""
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(config.seed), dtype=torch.float64)
    middle = sorted(config.widths)[len(config.widths) // 2]
    sizes = [(w, sorted(config.depths)[min(1, len(config.depths) - 1)]) for w in config.widths]
    for width, depth in dict.fromkeys([*sizes, *((middle, d) for d in config.depths)]):
        traces = np.zeros((2, config.draws))  # Row 0 is for full fine-tuning, row 1 for the scales.
        for draw in range(config.draws):
            recipe = Recipe(
                generator=torch.Generator().manual_seed(1000 * config.seed + draw), sigma_w=2**0.5,
                parametrization="standard", multipliers="hidden",
            )  # fmt: skip
            network = MLP(32, width=width, depth=depth, activation="relu", recipe=recipe)
            parameters = dict(network.named_parameters())
            for name, kernel in ntk.layer_kernels(network, x, reduce="trace").items():
                traces[int(is_multiplier(name, parameters[name])), draw] += ntk.trace(kernel)
        yield _row("random network", "ReLU", traces[0], traces[1], config, width=width, depth=depth,
                   expected=_limit(x, width, depth))  # fmt: skip


def _limit(x: Tensor, width: int, depth: int) -> float:
    """k* from the infinite-width kernels; standard parametrisation multiplies a layer's K_F by n_in / sigma_w^2."""
    kernels = mlp_kernels(x, depth=depth, activation="relu", sigma_w=2**0.5, sigma_b=0)
    assert kernels.layers is not None
    sizes = [x.shape[1], *[width] * depth]
    full = sum(n / 2 * ntk.trace(k) for n, k in zip(sizes, kernels.layers.weights, strict=True))
    return math.sqrt(full / ntk.trace(kernels.propulsion))


def architectures(width: int) -> dict[str, Any]:
    """Configurations of classifiers of one width and four layers, by the name of the architecture."""
    common = {"vocab_size": 1000, "pad_token_id": 0, "num_labels": 2}
    sizes: dict[str, Any] = common | {
        "hidden_size": width, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 4 * width,
        "max_position_embeddings": 64,
    }  # fmt: skip
    gpt: dict[str, Any] = common | {"n_embd": width, "n_layer": 4, "n_head": 4, "n_positions": 64,
                                    "bos_token_id": None, "eos_token_id": None}  # fmt: skip
    return {
        "BERT": hf.BertConfig(**sizes),
        "RoBERTa": hf.RobertaConfig(**sizes),
        "GPT-2": hf.GPT2Config(**gpt),
        "Llama": hf.LlamaConfig(**sizes),
    }


def architecture_rows(config: Config) -> Iterator[dict[str, Any]]:
    """Yield rows of random classifiers of growing width, on random tokens."""
    generator = torch.Generator().manual_seed(config.seed)
    ids = torch.randint(5, 1000, (min(config.n_examples, 8), 16), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for width in (w for w in config.widths if w <= 256):
        for name, model_config in architectures(width).items():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                model = hf.AutoModelForSequenceClassification.from_config(model_config, trust_remote_code=False)
            yield _row("random architecture", name, *_diagonals(model, inputs), config, width=width, depth=4,
                       expected=1 / model_config.initializer_range)  # fmt: skip


def pretrained_rows(config: Config, tasks: Mapping[str, TaskData]) -> Iterator[dict[str, Any]]:
    """Yield rows of the packaged encoder, and of further models, on the sentences of every task."""
    for name, (task, data) in product((None, *config.models), tasks.items()):
        model, tokenizer = load_classifier(
            name, num_labels=data.task.num_labels, pooling=config.pooling, seed=config.seed,
            **config.loading,
        )  # fmt: skip
        inputs, _ = held_out(data, tokenizer, config.n_examples, config.seed)
        sizes = model.config
        paper = data.task.degree if task != "demo" else None
        label = Path(name).name if name else "MiniLM-L6"
        yield _row("pre-trained", f"{label}, {task}", *_diagonals(model, inputs), config, paper=paper,
                   width=sizes.hidden_size, depth=sizes.num_hidden_layers, expected=_weight_scale(model))  # fmt: skip


def _weight_scale(model: Any) -> float:
    """1 / the root mean square of the entries of the backbone's matrices: k* if they were random (docs/theory.md)."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and is_backbone(model, name)]
    return math.sqrt(sum(p.numel() for p in matrices) / sum(float(p.detach().square().sum()) for p in matrices))


def _diagonals(model: Any, inputs: dict[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Diagonals of the kernels of full fine-tuning without the head, and of Propulsion, over the examples."""
    body = backbone_prefix(model).replace(".", r"\.") + ".*"
    methods = {"full": backbone_tuning(model), "propulsion": Propulsion(modules=body)}
    kernels = ntk.adapter_kernels(model, inputs, methods, reduce="trace")
    return kernels["full"].diagonal().double().numpy(), kernels["propulsion"].diagonal().double().numpy()


def _row(
    kind: str, model: str, full: np.ndarray, propulsion: np.ndarray, config: Config, *, width: int, depth: int,
    expected: float, paper: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A row of k* with its 95 % bootstrap interval over the n entries of `full`: networks drawn, or examples.

    Raises:
        UserError: Propulsion's kernel is zero.
    """
    rng = np.random.default_rng(config.seed)
    picks = rng.integers(0, len(full), size=(1000, len(full)))
    if not propulsion[picks].sum(1).all():
        raise UserError(
            f"{model}: Propulsion's kernel is zero, so that no degree makes it as large as that of full fine-tuning: "
            "the layers' outputs are zero, or do not influence the model's"
        )
    low, high = np.quantile(np.sqrt(full[picks].sum(1) / propulsion[picks].sum(1)), [0.025, 0.975])
    ratio = float(full.sum() / propulsion.sum())
    return {"kind": kind, "model": model, "width": width, "depth": depth, "ratio": ratio,
            "matching_degree": math.sqrt(ratio), "low": float(low), "high": float(high), "expected": expected,
            "paper_degree": paper}  # fmt: skip


def _check(config: Config) -> None:
    if not config.widths or not config.depths:
        raise UserError("there must be a width and a depth")
    if any(w % 4 for w in config.widths):
        raise UserError(f"widths must be multiples of 4, the number of attention heads; got {config.widths}")
    for task in config.tasks:
        get_labelled_task(task)
    for model in config.models:
        find_config(model, "SEQ_CLS", trust_remote_code=config.trust_remote_code)


def find(config: Config) -> Findings:
    """Measure random networks, random architectures and pre-trained models."""
    check_folders(config.tasks, config.data_dir)
    tasks = {task: load_task_data(task, data_dir=config.data_dir, seed=config.seed) for task in config.tasks}
    rows = []
    for part in (mlp_rows, architecture_rows, partial(pretrained_rows, tasks=tasks)):
        rows += list(part(config))
        print(f"{len(rows)} networks measured", flush=True)
    encoders = [model_identity(name, config.pooling, **config.loading) for name in (None, *config.models)]
    return Findings(
        metrics=[
            Metric("matching_degree", r["matching_degree"], r["low"], r["high"], "degree", "initialisation", "full",
                   f"{r['kind']}, {r['model']}, width {r['width']}, depth {r['depth']}")
            for r in rows
        ],
        tables={"ratios": rows},
        model={"name": ", ".join(("random networks", "the packaged encoder", *config.models)),
               "pooling": [encoder["pooling"] for encoder in encoders],
               "fingerprint": [encoder["fingerprint"] for encoder in encoders]},
        dataset={"name": ", ".join(tasks), "fingerprint": {task: data.fingerprint for task, data in tasks.items()}},
        coverage={"full": "every parameter but the head", "propulsion": "a multiplier on every layer but the head"},
    )  # fmt: skip


@summary_of_blocks
def summary(result: Result) -> Iterator[Block]:
    """One row for each model."""
    yield ["model", "width", "depth", "tr K_F / tr K_P(1)", "k*", "k* expected", "paper's degree"], [
        [f"{r['kind']}: {r['model']}", str(r["width"]), str(r["depth"]), number(r["ratio"]),
         interval(r["matching_degree"], r["low"], r["high"]), number(r["expected"]), number(r["paper_degree"])]
        for r in result.tables["ratios"]
    ]  # fmt: skip


ANALYSIS = Analysis(
    "degree_scale", Config, find, summary,
    least={"widths": 1, "depths": 1, "draws": 1, "n_examples": 1},
    check=_check,
    about=lambda config: f"the paper's best degrees are about {PAPER_BEST[0]} to {PAPER_BEST[1]}",
)  # fmt: skip
run = ANALYSIS.run

if __name__ == "__main__":
    ANALYSIS.command(__doc__)
