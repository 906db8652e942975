"""What matters in Propulsion: one choice varied at a time, all else at its default.

    python -m analyses.ablation --task sst2 --data-dir glue --factor degree

Degree is varied twice: with the learning rate divided by it, as `propulsion.training.learning_rates` does, and with one
rate for all, as in the paper, where a degree is also a learning rate (for Adam, k times as large).
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from analyses.core.analysis import check_seeds
from analyses.core.cells import Grid
from analyses.core.errors import run_command
from analyses.core.intervals import mean_interval
from analyses.publish import publish
from analyses.records import Metric, Result, environment, format_table, interval, number
from analyses.subjects.training_run import RunConfig, chance_score, training_run
from propulsion.data import TaskData
from propulsion.errors import Diverged, UserError
from propulsion.methods import Method
from propulsion.training.learning_rates import SCALE_RATE

Factor = Literal["degree", "degree_fixed_rate", "positions", "init_value", "layers", "vectors"]
DEGREES = (1, 5, 15, 25, 55, 75, 100)
POSITIONS = ("all", "attn", "query", "key", "value", "attention_output", "mlp", "embedding", "norm")


FREE = ("task", "factor", "reference_degree", "n_layers", "seeds", "run.data_dir", "run.model")
"""Fields that no cell depends on: its setting, which follows from the factor, and its seed are its own."""


@dataclass(frozen=True)
class Setting:
    """One value of a factor.

    Attributes:
        label: What tables and figures call it.
        options: Options of Propulsion.
        learning_rate: Of the scales; by default the rule's.
    """

    label: str
    options: dict[str, Any]
    learning_rate: float | None = None


@dataclass(frozen=True)
class Config:
    """One choice in Propulsion varied, all else at its default."""

    task: str = "demo"
    """Classification or regression task."""
    factor: Factor = "degree"
    """What is varied."""
    reference_degree: float = 15.0
    """Degree whose rate all have in degree_fixed_rate, and that of the other factors' runs."""
    n_layers: int = 6
    """Blocks of the model, for the factor layers."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs."""
    run: tyro.conf.OmitArgPrefixes[RunConfig] = field(default_factory=RunConfig)
    """What each run is."""
    runs_dir: Path | None = None
    """Folder of the finished cells; by default the result folder's name with -runs."""
    max_runs: int | None = None
    """Compute this many cells at most in this call."""
    output_dir: Path | None = None
    """Result folder; by default results/ablation-FACTOR."""
    overwrite: bool = False
    """Replace an earlier result in that folder."""


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


def run(config: Config) -> Result | None:
    """Compute what is missing, up to ``max_runs``, and summarise; None if cells are still missing.

    A run that diverges is a result too: its score counts as undefined, and the table says so.

    Raises:
        UserError: Unusable options, data or model; cells of other settings.
    """
    started = time.time()
    check_seeds(config.seeds)
    if config.n_layers < 1 or config.reference_degree <= 0:
        raise UserError("n_layers and reference_degree must be positive")
    data, chosen = config.run.load(config.task), settings_of(config)
    folder = config.runs_dir or _output(config).with_name(f"{_output(config).name}-runs")
    grid = Grid(folder, config.max_runs)
    cells = grid.of(config, data, config.run.identity(data), free=FREE)
    found: dict[str, list[dict[str, Any]]] = {setting.label: [] for setting in chosen}

    def compute(*, setting: Setting, seed: int) -> dict[str, Any]:
        return _train(config.run, data, setting, seed)

    for seed in config.seeds:
        for setting in chosen:
            label = f"{config.task}.{config.factor}.{setting.label}.seed{seed}"
            cell = cells.cell(label, compute, setting=setting, seed=seed)
            if cell is not None:
                found[setting.label].append(cell)
    if grid.missing:
        grid.say_missing()
        return None
    return _result(config, data, found, time.time() - started)


def _train(shared: RunConfig, data: TaskData, setting: Setting, seed: int) -> dict[str, Any]:
    method = Method("propulsion", setting.options)
    if setting.learning_rate is not None:
        shared = replace(shared, training=replace(shared.training, learning_rate=setting.learning_rate))
    try:
        found = training_run(shared, data, method, seed=seed)
    except Diverged as error:
        return {"score": None, "last_loss": None, "trained_parameters": 0, "diverged": str(error)}
    score = next(iter(found["scores"].values()))
    return {
        "score": score,
        "last_loss": float(np.mean(found["losses"][-10:])),
        "trained_parameters": found["trained_parameters"],
        "diverged": "",
    }


def _result(config: Config, data: TaskData, found: dict[str, list[dict[str, Any]]], seconds: float) -> Result:
    rows, metrics = [], []
    for label, cells in found.items():
        for name in ("score", "last_loss"):
            value, low, high = mean_interval([np.nan if cell[name] is None else cell[name] for cell in cells])
            metrics.append(Metric(name, value, low, high, "", "trained", label, ""))
        rows.append({
            "setting": label,
            "trained_parameters": max(cell["trained_parameters"] for cell in cells),
            "diverged": sum(bool(cell["diverged"]) for cell in cells),
            "scores": [cell["score"] for cell in cells],
        })  # fmt: skip
    return Result(
        analysis="ablation", config=asdict(config), seed=config.seeds[0], metrics=metrics, tables={"settings": rows},
        arrays={}, model=config.run.model_identity(),
        dataset={"name": config.task, "metric": data.task.metrics[0], "chance": chance_score(data),
                 "fingerprint": data.fingerprint},
        environment=environment(), seconds={"this call": seconds}, coverage={},
    )  # fmt: skip


def summary(result: Result, *, markdown: bool = False) -> str:
    """One row a value of the factor."""
    rows: list[Sequence[str]] = []
    for row in result.tables["settings"]:
        score, loss = (result.metric(name, stage="trained", left=row["setting"]) for name in ("score", "last_loss"))
        diverged = f" ({row['diverged']} diverged)" if row["diverged"] else ""
        rows.append([row["setting"], interval(score.value, score.low, score.high) + diverged, number(loss.value),
                     f"{row['trained_parameters']:,}"])  # fmt: skip
    header = [result.config["factor"], f"{result.dataset['name']}, {result.dataset['metric']}", "last loss", "trained"]
    return format_table(header, rows, markdown=markdown)


def _output(config: Config) -> Path:
    return config.output_dir or Path("results") / f"ablation-{config.factor}"


def main(config: Config) -> None:
    """Run, print, write the result folder, draw the figures."""
    about = f"intervals: 95 %, Student's over {len(config.seeds)} seeds"
    publish(lambda: run(config), _output(config), summary=summary, overwrite=config.overwrite, about=about)


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Config, prog="python -m analyses.ablation", description=__doc__)))
