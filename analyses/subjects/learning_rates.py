"""Reads the learning rates that a stored comparison of methods chose."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from analyses.records import Result, load_result
from propulsion.errors import UserError

T = TypeVar("T")


def tuned_factors(comparison: Path | None, task: str | None = None) -> dict[str, float]:
    """By method, the factor on its default learning rate with which a comparison trained it on a task.

    Args:
        comparison: Result folder of `analyses.method_comparison`; if None, there are no factors.
        task: The task; by default the first one in the result.

    Raises:
        RecordError: The folder holds no such result.
    """
    if comparison is None:
        return {}
    result = load_result(comparison, analysis="method_comparison")
    rows = result.tables["summary"]
    chosen = rows[0]["task"] if task is None else task
    return {row["method"]: trained_factor(result, row) for row in rows if row["task"] == chosen}


def factors_of(methods: Iterable[str], comparison: Path | None, task: str) -> dict[str, float]:
    """For each of these methods, the factor on its default learning rate in a comparison; 1 if `comparison` is None.

    Raises:
        RecordError: The folder holds no result of a comparison.
        UserError: The comparison has no learning rate of a method on the task.
    """
    if comparison is None:
        return dict.fromkeys(methods, 1.0)
    return of_methods(methods, tuned_factors(comparison, task), f"{comparison}", f" on {task}")


def of_methods(methods: Iterable[str], found: Mapping[str, T], source: str, where: str = "") -> dict[str, T]:
    """The entries of `found` for these methods; `source` and `where` say in the message where they were read.

    Raises:
        UserError: There is no entry for one of the methods.
    """
    if absent := [text for text in methods if text not in found]:
        raise UserError(f"{source} holds no learning rate of {', '.join(absent)}{where}")
    return {text: found[text] for text in methods}


def trained_factor(comparison: Result, row: Mapping[str, Any]) -> float:
    """Factor on its default learning rate at which a comparison trained a method: its own times that of all methods.

    Args:
        comparison: Result of `analyses.method_comparison`.
        row: The method's row in its summary.
    """
    return row["rate_factor"] * comparison.config["run"]["training"].get("rate_multiplier", 1.0)
