"""Reads the learning rates that a stored comparison of methods chose."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from analyses.records import Result, load_result
from propulsion.data import TaskData
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


def check_origin(
    path: Path | None, data: TaskData, identity: Callable[[], Mapping[str, Any]], *,
    analysis: str = "method_comparison",
) -> None:  # fmt: skip
    """Check that an earlier result, if there is one, is of the same task, data and model.

    The rows must be drawn from the same ones, but need not be the same themselves. Results of earlier versions state
    neither all rows nor the model's fingerprint: of them the names alone are compared.

    Args:
        path: The folder of the result; nothing is checked if None.
        data: The task and its data.
        identity: Returns the identity of the model, as results store it.
        analysis: The analysis that the result must come from.

    Raises:
        RecordError: The folder holds no result of the analysis.
        UserError: The result is of another task, of other data or of another model.
    """
    if path is None:
        return
    result, task = load_result(path, analysis=analysis), data.task.name
    tasks = result.dataset.get("tasks", {result.dataset.get("name"): result.dataset})
    if task not in tasks:
        raise UserError(f"{path} is of {', '.join(map(str, tasks))}, not of {task}: name a result of this task")
    if (rows := tasks[task].get("all_rows")) not in (None, data.all_rows):
        raise UserError(f"{path} is of other data of {task} (SHA-256 {rows[:12]}...): compute it again on this data")
    model = identity()
    key = "fingerprint" if "fingerprint" in result.model else "name"
    if result.model.get(key) != model[key]:
        raise UserError(
            f"{path} is of another model ({result.model.get('name')}), or reads it by another pooling: compute it "
            f"again with {model['name']}"
        )


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
