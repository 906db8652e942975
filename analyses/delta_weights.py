"""How does each method change the weights? Rank and size of the change of every weight (the paper's Table 6).

Delta W is the merged weight after training minus the pre-trained weight. Propulsion multiplies row j of W by z_j^k, so
that its delta W is W * (z^k - 1), row by row, which has full rank wherever W has, unless an entry of z is 1. For
Propulsion the quantiles of z and z^k are reported too.

    python -m analyses.delta_weights --task sst2 --data-dir glue --comparison results/method_comparison
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import tyro
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn

from analyses.core.analysis import Analysis, Findings, Output
from analyses.records import Block, Metric, Result, metric_cell, number, summary_of_blocks
from analyses.subjects.learning_rates import check_origin
from analyses.subjects.training_run import RatedRuns, RunConfig, training_run
from propulsion.errors import UserError
from propulsion.layer import adapted_layers
from propulsion.methods import parse_methods
from propulsion.training_checks import SCALE_NAME

COST = "three minutes"

QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)
MEASURES = {
    "relative_size": "|dW| / |W|",
    "rank_share": "rank / full rank",
    "effective_rank_share": "effective rank / full rank",
    "first_share": "energy of the first singular value",
}


@dataclass(frozen=True)
class Config(RatedRuns, Output):
    """Options of the analysis."""

    methods: tuple[str, ...] = (
        "full", "propulsion:positions=all", "propulsion:positions=attn", "propulsion:vectors=4", "lora", "ia3", "loha",
        "bitfit",
    )  # fmt: skip
    """Methods that can be merged, each NAME or NAME:OPTION=VALUE,OPTION=VALUE."""
    run: tyro.conf.OmitArgPrefixes[RunConfig] = field(default_factory=RunConfig)
    """Options of every run."""

    @property
    def seed(self) -> int:
        """The one seed of the runs; a property, since two options named seed would be refused."""
        return self.run.training.seed


def singular_value_measures(delta: Float[Tensor, "a b"], weight: Float[Tensor, "a b"]) -> dict[str, float]:
    """Size and rank of a change of a weight.

    The rank counts singular values above eps * max(a, b) times the weight's own largest; the effective rank is exp of
    the entropy of the squared singular values' shares. A change of zero has rank 0. The relative size of a change of a
    weight of zeros is not a number.
    """
    values = torch.linalg.svdvals(delta.double())
    energy = values**2
    total = float(energy.sum())
    full = min(delta.shape)
    if total == 0:
        return dict.fromkeys(MEASURES, 0.0)
    # Merged weights are float32, so the rounding error of their difference is relative to W, not to the difference.
    floor = max(delta.shape) * torch.finfo(torch.float32).eps * float(torch.linalg.matrix_norm(weight.double(), 2))
    shares = energy[energy > 0] / total
    return {
        "relative_size": math.sqrt(total) / size if (size := float(weight.double().norm())) else math.nan,
        "rank_share": float((values > floor).sum()) / full,
        "effective_rank_share": float(torch.exp(-(shares * shares.log()).sum())) / full,
        "first_share": float(energy[0]) / total,
    }


def delta_weights(model: nn.Module, base: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Measures of every linear layer's matrix that training changed, by the layer's name.

    A `PeftModel` is merged, in place.
    """
    merged: Any = model.merge_and_unload() if isinstance(model, PeftModel) else model
    found = {}
    for name, module in merged.base_model.named_modules():
        key = f"{name}.weight"
        if isinstance(module, nn.Linear) and key in base and not torch.equal(module.weight, base[key]):
            found[name] = singular_value_measures(module.weight.detach() - base[key], base[key])
    return found


def scales(model: nn.Module) -> dict[str, np.ndarray]:
    """z and z^k of a Propulsion model, each concatenated over its layers; empty for any other model."""
    z, powers = [], []
    for layer in adapted_layers(model):
        for adapter, value in getattr(layer, SCALE_NAME).items():
            k = float(layer.degree[adapter])
            flat = value.detach().double().reshape(-1)
            z.append(flat)
            powers.append(flat.sign() * flat.abs() ** k)
    return {} if not z else {"z": torch.cat(z).numpy(), "z^k": torch.cat(powers).numpy()}


def find(config: Config) -> Findings:
    """Train every method once and measure the change of the weights.

    Raises:
        UserError: A method cannot be merged.
    """
    methods = parse_methods(config.methods)
    factors, data = config.factors(methods), config.run.load(config.task)
    check_origin(config.comparison, data, config.run.model_identity)
    network = config.run.start(data, seed=config.seed)[0]
    base = {name: weight.clone() for name, weight in network.base_model.state_dict().items()}
    layers, rows, metrics, arrays = [], [], [], {}
    for text, method in methods.items():
        print(f"{text} ...", flush=True)
        factor = factors[text]
        found = training_run(config.run, data, method, seed=config.seed, rate_multiplier=factor, keep_model=True)
        moved = scales(found["model"])
        arrays |= {f"{name}.{text}": values for name, values in moved.items()}
        try:
            changed = delta_weights(found["model"], base)
        except (AttributeError, NotImplementedError) as error:
            raise UserError(f"method {text} cannot be merged: leave it out") from error
        layers += [{"method": text, "layer": name} | measures for name, measures in changed.items()]
        row = {"method": text, "rate_factor": factor, "changed_matrices": len(changed)} | found["scores"]
        quantiles = {f"{name} q{q:g}": float(np.quantile(v, q)) for name, v in moved.items() for q in QUANTILES}
        rows.append(row | quantiles)
        for measure in MEASURES:
            values = [measures[measure] for measures in changed.values()] or [0.0]
            middle, low, high = (float(of(values)) for of in (np.median, np.min, np.max))
            metrics.append(Metric(measure, middle, low, high, "", "trained", text, ""))
    return Findings(
        metrics, tables={"methods": rows, "layers": layers}, arrays=arrays, model=config.run.model_identity(),
        dataset={"name": config.task, "metric": data.task.metrics[0], "fingerprint": data.fingerprint},
    )  # fmt: skip


@summary_of_blocks
def summary(result: Result) -> Iterator[Block]:
    """Median over layers and [lowest, highest] of every measure; then the quantiles of z and z^k."""
    metric = result.dataset["metric"]
    rows = []
    for row in result.tables["methods"]:
        cells = [metric_cell(result.metric(name, stage="trained", left=row["method"])) for name in MEASURES]
        rows.append([row["method"], str(row["changed_matrices"]), *cells, number(row[metric])])
    yield ["method", "matrices", *MEASURES.values(), metric], rows
    names = [f"{name} q{q:g}" for name in ("z", "z^k") for q in QUANTILES]
    if moved := [row for row in result.tables["methods"] if names[0] in row]:
        rows = [[row["method"], *(number(row[name]) for name in names)] for row in moved]
        yield ["quantiles after training", *names], rows


ANALYSIS = Analysis(
    "delta_weights", Config, find, summary, about=lambda config: "medians and [lowest, highest] over layers"
)
run = ANALYSIS.run

if __name__ == "__main__":
    ANALYSIS.command(__doc__)
