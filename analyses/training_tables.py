"""Stored results of the analyses of training as tables, in Markdown, for documents.

python -m analyses.training_tables docs/results/method_comparison/*
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from analyses import (
    ablation,
    complexity,
    convergence,
    delta_weights,
    instruction_tuning,
    memory,
    method_comparison,
    parameter_count,
)
from analyses.core.errors import run_command
from analyses.kernel_drift.tables import summary as kernel_drift_summary
from analyses.records import Result, load_result
from propulsion.errors import UserError

SUMMARIES: dict[str, Callable[..., str]] = {
    "ablation": ablation.summary,
    "complexity": complexity.summary,
    "convergence": convergence.summary,
    "delta_weights": delta_weights.summary,
    "instruction_tuning": instruction_tuning.summary,
    "kernel_drift": kernel_drift_summary,
    "memory": memory.summary,
    "method_comparison": method_comparison.summary,
    "parameter_count": parameter_count.summary,
}


@dataclass(frozen=True)
class Config:
    """The tables of stored results, in Markdown."""

    results: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Result folders."""
    trials: bool = False
    """What comparisons of methods chose learning rates by, in place of what came of them."""


def table(result: Result, *, trials: bool = False) -> str:
    """The tables of one result, or, of a comparison of methods, of the trials that chose its learning rates.

    Raises:
        UserError: It comes from another analysis, or holds no trials.
    """
    if trials:
        if result.analysis != "method_comparison" or not result.tables["tuning"]:
            raise UserError(f"this result of {result.analysis} tried no learning rates")
        return method_comparison.trials(result)
    if result.analysis not in SUMMARIES:
        raise UserError(f"a result of {result.analysis} is not one of {', '.join(SUMMARIES)}")
    return SUMMARIES[result.analysis](result, markdown=True)


def main(config: Config) -> None:
    """Print the tables of each result, under its own heading."""
    if not config.results:
        raise UserError("name one or more result folders")
    for folder in config.results:
        print(f"## {folder.name}\n\n{table(load_result(folder), trials=config.trials)}\n")


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Config, prog="python -m analyses.training_tables", description=__doc__)))
