"""How well does each method tune a language model on instructions, judged by the text that it generates?

    python -m analyses.instruction_tuning --data-dir glue/sst2 --model smollm2-135m

Every method is one run of `propulsion.train` in its own folder, with the same rows in the same order; an interrupted
run resumes from its last checkpoint. A model in a GGUF file is dequantised first. The methods are compared with the
untuned model and with two baselines: always giving the commonest answer of the validation rows, and, for tasks with
choices, choosing at random.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int
from scipy import stats

from analyses.core.analysis import Analysis, Findings, Output, runs_folder
from analyses.core.locks import held
from analyses.records import Block, Metric, Result, metric_cell, number, summary_of_blocks
from propulsion.data import load_task_data
from propulsion.data.instructions import Exchange, extract
from propulsion.data.kinds.base import columns_of
from propulsion.data.kinds.instruction import exchanges_of
from propulsion.data.tasks import get_task
from propulsion.errors import UserError
from propulsion.methods import Method, parse_methods
from propulsion.pretrained import fingerprint, load_model
from propulsion.pretrained.options import LOADING_OPTIONS, LoadingOptions
from propulsion.train import TrainConfig, TrainResult
from propulsion.train import run as train_run
from propulsion.training.run_folder import ANEW, ANOTHER, predictions_of

COST = "fifteen minutes"

UNTUNED = "none"
MAJORITY, CHANCE = "commonest answer", "chance"
RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Config(LoadingOptions, Output):
    """Options of the analysis."""

    model: str
    """Name (`python -m propulsion.models` lists them), hub name, folder or GGUF file of a language model."""
    task: str = "sst2_instruction"
    """Instruction task, such as sst2_instruction, boolq or gsm8k."""
    data_dir: Path | None = None
    """Folder of the task's files, or of several tasks' folders; without it, the Hugging Face hub."""
    methods: tuple[str, ...] = (UNTUNED, "propulsion", "lora")
    """Methods, each NAME or NAME:OPTION=VALUE,OPTION=VALUE; none is the untuned model."""
    max_steps: int = 60
    """Optimizer steps."""
    per_device_train_batch_size: int = 8
    """Training rows in a batch."""
    max_train_samples: int = 480
    """Number of training rows, drawn by the seed."""
    max_eval_samples: int = 200
    """Number of validation rows, drawn by the seed."""
    max_length: int = 128
    """Keep only this many tokens of a prompt, the last ones."""
    learning_rate: float | Literal["auto"] | None = "auto"
    """Learning rate of every method's parameters: a number; auto, measured; or None, the method's fixed rate."""
    seed: int = 0
    """Seed of every random draw."""
    runs_dir: Path | None = None
    """Folder of the training runs; by default the result folder's name followed by -runs."""


def _check(config: Config) -> None:
    task = get_task(config.task)
    if task.kind != "instruction":
        raise UserError(f"task {task.name} is not an instruction task: choose one such as sst2_instruction or gsm8k")


def find(config: Config) -> Findings:
    """Train and evaluate every method."""
    methods = parse_methods(config.methods)
    data = load_task_data(
        config.task, data_dir=config.data_dir, n_train=config.max_train_samples, n_validation=config.max_eval_samples,
        seed=config.seed,
    )  # fmt: skip
    exchanges = exchanges_of(columns_of(data.validation))
    folder = runs_folder(config, ANALYSIS.folder(config))
    found, said = {}, {}
    with held(folder):
        for text, method in methods.items():
            print(f"{text} ...", flush=True)
            place = folder / text.replace(":", "-")
            found[text] = _trained(_options(config, method, place))
            if (predictions := predictions_of(place)) is not None:
                said[text] = predictions
    rows = [{"method": text} | _row(result) for text, result in found.items()]
    right = {text: np.array([e.is_right(t) for e, t in zip(exchanges, texts, strict=True)], dtype=np.int8)
             for text, texts in said.items()}  # fmt: skip
    answers = [
        {"row": place, "answer": extract(exchange.answer, exchange.choices),
         "said": {text: texts[place] for text, texts in said.items()}}
        for place, exchange in enumerate(exchanges)
    ]  # fmt: skip
    network, _ = load_model(config.model, task_type="CAUSAL_LM", **config.loading)
    return Findings(
        metrics=[*_accuracies(rows, len(exchanges)), *_differences(right)],
        tables={"methods": rows, "baselines": baselines(exchanges), "said": answers},
        arrays={f"right.{text}": values for text, values in right.items()},
        model={"name": Path(config.model).name, "fingerprint": fingerprint(network)},
        dataset={"name": config.task, "fingerprint": data.fingerprint},
        config={"model": Path(config.model).name},
    )  # fmt: skip


def baselines(exchanges: Sequence[Exchange]) -> list[dict[str, Any]]:
    """Accuracy of the rows' commonest answer, and of a random choice, which is None if a row has no choices."""
    answers = Counter(extract(exchange.answer, exchange.choices) for exchange in exchanges)
    answer, count = answers.most_common(1)[0]
    shares = [1 / len(exchange.choices) for exchange in exchanges if exchange.choices]
    chance = float(np.mean(shares)) if len(shares) == len(exchanges) else None
    return [
        {"baseline": MAJORITY, "answer": answer, "accuracy": count / len(exchanges)},
        {"baseline": CHANCE, "answer": None, "accuracy": chance},
    ]


def paired_interval(left: Int[np.ndarray, " n"], right: Int[np.ndarray, " n"]) -> tuple[float, float, float]:
    """Difference of two accuracies on the same n rows with its 95 % bootstrap interval: (value, low, high)."""
    difference = left.astype(float) - right.astype(float)
    draws = np.random.default_rng(0).integers(0, len(difference), (RESAMPLES, len(difference)))
    low, high = np.quantile(difference[draws].mean(axis=1), [0.025, 0.975])
    return float(difference.mean()), float(low), float(high)


def _accuracies(rows: Sequence[dict[str, Any]], n: int) -> list[Metric]:
    metrics = []
    for row in rows:
        low, high = map(float, stats.binomtest(round(row["accuracy"] * n), n).proportion_ci(method="wilson"))
        metrics.append(Metric("accuracy", row["accuracy"], low, high, "", "trained", row["method"], ""))
    return metrics


def _differences(right: dict[str, np.ndarray]) -> list[Metric]:
    """Differences of every method's accuracy from the untuned model's, paired by row."""
    return [
        Metric("accuracy", *paired_interval(values, right[UNTUNED]), "", "difference", text, UNTUNED)
        for text, values in right.items()
        if text != UNTUNED and UNTUNED in right
    ]


def _trained(config: TrainConfig) -> TrainResult:
    """Train and evaluate, with advice in the options of this command."""
    try:
        return train_run(config)
    except UserError as error:
        advice = str(error).replace(ANEW, "name another --runs-dir").replace(ANOTHER, "name another --runs-dir")
        raise UserError(advice) from error


def _options(config: Config, method: Method, folder: Path) -> TrainConfig:
    shared = ("task", "data_dir", "model", "per_device_train_batch_size", "max_train_samples", "max_eval_samples",
              "max_length", "learning_rate", "seed", *LOADING_OPTIONS)  # fmt: skip
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


@summary_of_blocks
def summary(result: Result) -> Iterator[Block]:
    """One row for each method, then the baselines."""
    rows = []
    for row in result.tables["methods"]:
        accuracy = result.metric("accuracy", stage="trained", left=row["method"])
        paired = result.find("accuracy", stage="difference", left=row["method"], right=UNTUNED)
        rows.append([row["method"], metric_cell(accuracy), metric_cell(paired), number(row["answered"]),
                     number(row["last_loss"]), f"{row['trained_parameters']:,}", str(row["steps"])])  # fmt: skip
    for row in result.tables.get("baselines", []):
        name = row["baseline"] if row["answer"] is None else f"{row['baseline']} ({row['answer']})"
        rows.append([name, number(row["accuracy"]), *["-"] * 5])
    yield ["method", "accuracy", "accuracy - untuned", "answered", "last loss", "trained", "steps"], rows


ANALYSIS = Analysis(
    "instruction_tuning", Config, find, summary,
    least=dict.fromkeys(
        ("max_steps", "per_device_train_batch_size", "max_train_samples", "max_eval_samples", "max_length"), 1
    ),
    check=_check,
    about=lambda config: (
        f"intervals: 95 %, Wilson's over {config.max_eval_samples} rows; of differences, bootstrap over the same rows"
    ),
)  # fmt: skip
run = ANALYSIS.run

if __name__ == "__main__":
    ANALYSIS.command(__doc__)
