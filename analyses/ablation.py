"""Which of Propulsion's choices matter? One choice is varied at a time, and all others keep their default.

    python -m analyses.ablation --task sst2 --data-dir glue --factor degree

The degree is varied in two ways: with the learning rate divided by the degree, as `propulsion.training.learning_rates`
does, and with one learning rate for all degrees, as in the paper, where a degree k has the effect of a larger learning
rate (k times as large, for Adam).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from analyses.core.analysis import Analysis, Findings, GridOutput, Runs
from analyses.core.intervals import mean_interval
from analyses.core.scales import scale_of
from analyses.records import Block, Metric, Result, metric_cell, number, summary_of_blocks
from analyses.subjects.training_run import RunConfig, TaskRuns, chance_score, training_run
from propulsion.data import TaskData
from propulsion.errors import Diverged
from propulsion.methods import Method
from propulsion.training.learning_rates import SCALE_RATE

COST = "twenty minutes"

Factor = Literal["degree", "degree_fixed_rate", "positions", "init_value", "layers", "vectors"]
DEGREES = (1, 5, 15, 25, 55, 75, 100)
POSITIONS = ("all", "attn", "query", "key", "value", "attention_output", "mlp", "embedding", "norm")


@dataclass(frozen=True)
class Setting:
    """One value of a factor.

    Attributes:
        label: Its name in tables and figures.
        options: Options of Propulsion.
        learning_rate: Learning rate of the scales; None for the rate that the run's options give.
    """

    label: str
    options: dict[str, Any]
    learning_rate: float | None = None


@dataclass(frozen=True)
class Config(TaskRuns, GridOutput):
    """Options of the analysis."""

    factor: Factor = "degree"
    """Choice that is varied; degree_fixed_rate varies the degree at one learning rate."""
    reference_degree: float = 15.0
    """Degree when another choice is varied; with degree_fixed_rate, the degree whose learning rate all runs have."""
    n_layers: int = 6
    """Number of blocks of the model, for --factor layers."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs."""


def settings_of(config: Config) -> list[Setting]:
    """The values of a factor."""
    k = {"degree": config.reference_degree}
    n = config.n_layers
    if config.factor == "degree":
        return [Setting(f"{degree:g}", {"degree": degree}) for degree in DEGREES]
    if config.factor == "degree_fixed_rate":
        return [Setting(f"{d:g}", {"degree": d}, SCALE_RATE / config.reference_degree) for d in DEGREES]
    if config.factor == "positions":
        return [Setting(position, k | {"positions": [position]}) for position in POSITIONS]
    if config.factor == "init_value":
        return [Setting(f"{value:g}", k | {"init_value": value}) for value in (0.5, 0.9, 0.98, 1.0, 1.02, 1.1)]
    if config.factor == "layers":
        blocks = {f"first {count}": list(range(count)) for count in _counts(n)}
        blocks |= {f"last {count}": list(range(n - count, n)) for count in _counts(n)[:-1]}
        return [Setting(label, k | {"layers_to_transform": layers}) for label, layers in blocks.items()]
    pooled = [Setting(f"{p} {pooling}", k | {"vectors": p, "pooling": pooling})
              for p in (2, 4) for pooling in ("mean", "max", "min", "l2")]  # fmt: skip
    return [Setting("1", k), *pooled]


def _counts(n: int) -> list[int]:
    return sorted({1, max(1, n // 3), max(1, 2 * n // 3), n})


def find(config: Config, runs: Runs) -> Findings | None:
    """Compute the missing cells and summarise all; None if some are still missing.

    The score of a run that diverges counts as undefined, and the table says how many runs diverged.
    """
    data, chosen = config.run.load(config.task), settings_of(config)
    cells = runs.of(data, config.run.identity(data))
    found: dict[str, list[dict[str, Any]]] = {setting.label: [] for setting in chosen}
    for seed in config.seeds:
        for setting in chosen:
            label = f"{config.task}.{config.factor}.{setting.label}.seed{seed}"
            cell = cells.cell(label, partial(_train, config.run, data), setting=setting, seed=seed)
            if cell is not None:
                found[setting.label].append(cell)
    return None if runs.missing else _summarised(config, data, found)


def _train(shared: RunConfig, data: TaskData, *, setting: Setting, seed: int) -> dict[str, Any]:
    method = Method("propulsion", setting.options)
    if setting.learning_rate is not None:
        shared = replace(shared, training=replace(shared.training, learning_rate=setting.learning_rate))
    try:
        found = training_run(shared, data, method, seed=seed)
    except Diverged as error:
        return {"score": None, "last_loss": None, "trained_parameters": 0, "diverged": str(error)}
    return {
        "score": next(iter(found["scores"].values())), "last_loss": float(np.mean(found["losses"][-10:])),
        "trained_parameters": found["trained_parameters"], "diverged": "",
    }  # fmt: skip


def _summarised(config: Config, data: TaskData, found: dict[str, list[dict[str, Any]]]) -> Findings:
    rows, metrics = [], []
    for label, cells in found.items():
        for name in ("score", "last_loss"):
            scale = scale_of(data.task.metrics[0] if name == "score" else name)
            bounds = mean_interval([np.nan if cell[name] is None else cell[name] for cell in cells], scale)
            metrics.append(Metric(name, *bounds, "", "trained", label, ""))
        rows.append({
            "setting": label,
            "trained_parameters": max(cell["trained_parameters"] for cell in cells),
            "diverged": sum(bool(cell["diverged"]) for cell in cells),
            "scores": [cell["score"] for cell in cells],
        })  # fmt: skip
    return Findings(
        metrics, tables={"settings": rows}, model=config.run.model_identity(),
        dataset={"name": config.task, "metric": data.task.metrics[0], "chance": chance_score(data),
                 "fingerprint": data.fingerprint},
    )  # fmt: skip


@summary_of_blocks
def summary(result: Result) -> Iterator[Block]:
    """One row for each value of the factor."""
    rows = []
    for row in result.tables["settings"]:
        score, loss = (result.metric(name, stage="trained", left=row["setting"]) for name in ("score", "last_loss"))
        diverged = f" ({row['diverged']} diverged)" if row["diverged"] else ""
        rows.append([row["setting"], metric_cell(score) + diverged, number(loss.value),
                     f"{row['trained_parameters']:,}"])  # fmt: skip
    data = result.dataset
    yield [result.config["factor"], f"{data['name']}, {data['metric']}", "last loss", "trained"], rows


ANALYSIS = Analysis(
    "ablation", Config, find, summary,
    least={"n_layers": 1},
    above={"reference_degree": 0},
    # The setting of a cell, which follows from the factor, and its seed are its own, as are task, rows and model.
    free=("task", "factor", "reference_degree", "n_layers", "seeds", "run.data_dir", "run.model"),
    about=lambda config: f"intervals: 95 %, Student's over {len(config.seeds)} seeds",
    variant=lambda config: f"-{config.factor}",
)  # fmt: skip
run = ANALYSIS.run

if __name__ == "__main__":
    ANALYSIS.command(__doc__)
