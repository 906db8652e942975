"""The learning rates that a comparison of methods chose."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from analyses.records import Result, load_result


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
