"""Runs that differ by their seed: means with intervals, and the learning rates another analysis chose."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from analyses.records import Result, load_result
from propulsion.errors import UserError


def check_seeds(seeds: Sequence[int]) -> None:
    """Make sure that seeds can be repetitions.

    Raises:
        UserError: There are none, or they are negative or the same.
    """
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UserError(f"seeds must be one or more different numbers, none negative; got {tuple(seeds)}")


def over_seeds(seeds: Sequence[int], n_examples: int) -> str:
    """What a bootstrap over seeds and their examples is over, in words."""
    each = f"{len(seeds)} seeds and, in each, " if len(seeds) > 1 else ""
    return f"bootstrap over {each}{n_examples} examples"


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean of independent runs with Student's interval: (mean, low, high); the ends are NaN for a single run."""
    sample = np.asarray(values, dtype=float)
    mean = float(sample.mean())
    if len(sample) < 2:
        return mean, math.nan, math.nan
    half = stats.t.ppf((1 + level) / 2, len(sample) - 1) * sample.std(ddof=1) / math.sqrt(len(sample))
    return mean, mean - float(half), mean + float(half)


def tuned_factors(comparison: Path | None, task: str | None = None) -> dict[str, float]:
    """Factor on its default learning rate that every method of `analyses.method_comparison` trained at on a task.

    Args:
        comparison: Its result; without one there are no factors.
        task: The task; by default the result's first.

    Raises:
        UserError: The folder holds no such result.
    """
    if comparison is None:
        return {}
    result = load_result(comparison, analysis="method_comparison")
    rows = result.tables["summary"]
    chosen = rows[0]["task"] if task is None else task
    return {row["method"]: trained_factor(result, row) for row in rows if row["task"] == chosen}


def trained_factor(comparison: Result, row: Mapping[str, Any]) -> float:
    """Factor on its default learning rate that a method of a comparison trained at: the chosen one times that of all.

    Args:
        comparison: Result of `analyses.method_comparison`.
        row: The method's row in its summary.
    """
    return row["rate_factor"] * comparison.config["run"]["training"].get("rate_multiplier", 1.0)
