"""A language model tuned by instruction and evaluated by what it generates, beside its untuned self.

    python -m analyses.instruction_tuning --data-dir glue/sst2 --model SmolLM2-135M-Instruct.Q4_1.gguf

Every method is one run of `propulsion.train`, with the same rows in the same order, in a folder of its own: a killed
one goes on from its last checkpoint. A model in a GGUF file is dequantised first.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro
from scipy import stats

from analyses.results import Metric, Result, check_writable, environment, write_result
from analyses.tables import format_table, interval, number
from propulsion.errors import UserError, run_command
from propulsion.methods import Method
from propulsion.tasks import get_task
from propulsion.train import TrainConfig, TrainResult
from propulsion.train import run as train_run

UNTUNED = "none"


@dataclass(frozen=True)
class Config:
    """Methods on one instruction task, by generation."""

    model: str
    """Hub name, folder or GGUF file of a language model."""
    task: str = "sst2_instruction"
    """Instruction task."""
    data_dir: Path | None = None
    """Folder with train and validation files; without it, the Hugging Face hub."""
    methods: tuple[str, ...] = (UNTUNED, "propulsion", "lora")
    """Methods, each NAME or NAME:OPTION=VALUE,OPTION=VALUE; none is the untuned model."""
    max_steps: int = 60
    """Optimizer steps."""
    per_device_train_batch_size: int = 8
    """Rows of a batch."""
    max_train_samples: int = 480
    """Training rows, drawn by the seed."""
    max_eval_samples: int = 200
    """Validation rows, drawn by the seed."""
    max_length: int = 128
    """Cut prompts to this many tokens, at their beginning."""
    seed: int = 0
    """Seed of every random draw."""
    runs_dir: Path | None = None
    """Folder of the runs; by default the result folder's name with -runs."""
    output_dir: Path = Path("results/instruction_tuning")
    """Result folder."""
    overwrite: bool = False
    """Replace an earlier result in that folder."""


def run(config: Config) -> Result:
    """Train and evaluate every method.

    Raises:
        UserError: Unusable options, data or model; a run that diverged.
    """
    started = time.time()
    task = get_task(config.task)
    if task.kind != "instruction":
        raise UserError(f"task {task.name} is no instruction: choose sst2_instruction, boolq, gsm8k or their like")
    methods = {text: Method.parse(text) for text in config.methods}
    folder = config.runs_dir or config.output_dir.with_name(f"{config.output_dir.name}-runs")
    found = {}
    for text, method in methods.items():
        print(f"{text} ...", flush=True)
        found[text] = train_run(_options(config, method, folder / text.replace(":", "-")))
    rows = [{"method": text} | _row(result) for text, result in found.items()]
    metrics = []
    for row in rows:
        right = round(row["accuracy"] * config.max_eval_samples)
        bounds = stats.binomtest(right, config.max_eval_samples).proportion_ci(method="wilson")
        low, high = float(bounds.low), float(bounds.high)
        metrics.append(Metric("accuracy", row["accuracy"], low, high, "", "trained", row["method"], ""))
    return Result(
        analysis="instruction_tuning", config=asdict(config) | {"model": Path(config.model).name}, seed=config.seed,
        metrics=metrics, tables={"methods": rows}, arrays={}, model={"name": Path(config.model).name},
        dataset={"name": config.task}, environment=environment(), seconds={"this call": time.time() - started},
        coverage={},
    )  # fmt: skip


def _options(config: Config, method: Method, folder: Path) -> TrainConfig:
    shared = ("task", "data_dir", "model", "per_device_train_batch_size", "max_train_samples", "max_eval_samples",
              "max_length", "seed")  # fmt: skip
    words = tuple(f"{name}={_word(value)}" for name, value in method.options.items())
    return TrainConfig(
        **{name: getattr(config, name) for name in shared},
        method=method.name,
        method_options=words,
        max_steps=0 if method.name == UNTUNED else config.max_steps,
        max_target_length=8,
        per_device_eval_batch_size=32,
        save_steps=10,
        save_total_limit=1,
        logging_steps=10,
        output_dir=folder,
    )


def _word(value: Any) -> str:
    return f"{'+'.join(value)}+" if isinstance(value, list) else str(value)


def _row(result: TrainResult) -> dict[str, Any]:
    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    return {
        "trained_parameters": result.trained_parameters,
        "steps": result.steps,
        "last_loss": losses[-1] if losses else None,
        "learning_rates": result.learning_rates,
    } | result.metrics


def summary(result: Result, *, markdown: bool = False) -> str:
    """One row a method."""
    rows = []
    for row in result.tables["methods"]:
        metric = result.metric("accuracy", stage="trained", left=row["method"])
        rows.append([row["method"], interval(metric.value, metric.low, metric.high), number(row["answered"]),
                     number(row["last_loss"]), f"{row['trained_parameters']:,}", str(row["steps"])])  # fmt: skip
    header = ["method", "accuracy", "answered", "last loss", "trained", "steps"]
    return format_table(header, rows, markdown=markdown)


def main(config: Config) -> None:
    """Run, print, write the result folder."""
    check_writable(config.output_dir, overwrite=config.overwrite)
    result = run(config)
    print(f"\n{summary(result)}\n")
    folder = write_result(result, config.output_dir, overwrite=config.overwrite)
    print(f"intervals: 95 %, Wilson's over {config.max_eval_samples} rows; result in {folder}")


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Config, prog="python -m analyses.instruction_tuning", description=__doc__)))
