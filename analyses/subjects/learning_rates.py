"""The learning rates that a comparison of methods chose."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from analyses.records import Result, load_result
from propulsion.errors import UserError

T = TypeVar("T")


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


def factors_of(methods: Iterable[str], comparison: Path | None, task: str) -> dict[str, float]:
    """Factor on its default learning rate of each of these methods; 1 where there is no comparison.

    Raises:
        UserError: The comparison has no such result, or none of a method on the task.
    """
    if comparison is None:
        return dict.fromkeys(methods, 1.0)
    return of_methods(methods, tuned_factors(comparison, task), f"{comparison}", f" on {task}")


def of_methods(methods: Iterable[str], found: Mapping[str, T], source: str, where: str = "") -> dict[str, T]:
    """What a comparison holds of each of these methods.

    Raises:
        UserError: It holds nothing of one.
    """
    if absent := [text for text in methods if text not in found]:
        raise UserError(f"{source} holds no learning rate of {', '.join(absent)}{where}")
    return {text: found[text] for text in methods}


def trained_factor(comparison: Result, row: Mapping[str, Any]) -> float:
    """Factor on its default learning rate that a method of a comparison trained at: the chosen one times that of all.

    Args:
        comparison: Result of `analyses.method_comparison`.
        row: The method's row in its summary.
    """
    return row["rate_factor"] * comparison.config["run"]["training"].get("rate_multiplier", 1.0)
