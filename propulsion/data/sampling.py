"""Draws rows at random without replacement, in the proportions of their classes."""

from collections.abc import Sequence

import numpy as np
from datasets import Dataset

from propulsion.data.kinds import to_dataset
from propulsion.data.kinds.base import columns_of
from propulsion.data.tables import Columns
from propulsion.data.tasks import Task
from propulsion.errors import UserError


def draw_rows(data: Dataset, task: Task, n: int, seed: int) -> Dataset:
    """Draw n rows at random, keeping the classes' proportions as `load_task_data` does."""
    columns = columns_of(data)
    return to_dataset(task, select(columns, draw(task, "the validation rows", columns, n, seed)))


def draw(task: Task, name: str, columns: Columns, n: int | None, seed: int) -> list[int]:
    """The indices of the drawn rows, ascending; all rows if n is None."""
    total = len(columns[next(iter(columns))])
    if n is None:
        return list(range(total))
    if not 1 <= n <= total:
        raise UserError(
            f"cannot draw {n} rows from {name}: it has {total}; ask for 1 to {total}, or leave it out for all"
        )
    if seed < 0:
        raise UserError(f"seed is {seed}, expected at least 0")
    generator = np.random.default_rng(seed)
    if task.kind == "classification":
        chosen = _stratified(np.asarray(columns[task.label_column]), n, generator, name)
    else:
        chosen = generator.choice(total, n, replace=False)
    return sorted(chosen.tolist())


def select(columns: Columns, chosen: Sequence[int]) -> Columns:
    """The columns restricted to the rows of these indices."""
    return {column: [values[row] for row in chosen] for column, values in columns.items()}


def _stratified(labels: np.ndarray, n: int, generator: np.random.Generator, name: str) -> np.ndarray:
    """Indices of n rows drawn in the proportions of classes, by largest remainders, with at least one of each class."""
    classes, counts = np.unique(labels, return_counts=True)
    if n < len(classes):
        raise UserError(f"cannot draw {n} rows from {name}: it has {len(classes)} classes, and each needs a row")
    exact = (n - len(classes)) * (counts - 1) / max(1, len(labels) - len(classes))
    quota = np.floor(exact).astype(int)
    rest = n - len(classes) - quota.sum()
    quota[np.argsort(quota - exact, kind="stable")[:rest]] += 1
    groups = [np.flatnonzero(labels == c) for c in classes]
    return np.concatenate([generator.choice(group, q + 1, replace=False) for group, q in zip(groups, quota)])
