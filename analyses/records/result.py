"""The result of one run of an analysis: metrics with intervals, tables, arrays, and what is needed to run it again."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from analyses.records.errors import RecordError

STAGES = ("initialisation", "trained")


@dataclass(frozen=True)
class Metric:
    """One number about one kernel or one pair of kernels.

    Attributes:
        name: The quantity, such as "cka" or "relative_frobenius".
        value: Its value; not-a-number where the quantity is undefined.
        low: Lower end of its interval, None if it has none.
        high: Upper end of its interval, None if it has none.
        unit: Unit in words, "" for a pure number.
        stage: "initialisation" or "trained".
        left: The kernel it is about.
        right: The kernel, or null model, that `left` is compared with; "" for a metric of one kernel.
    """

    name: str
    value: float
    low: float | None
    high: float | None
    unit: str
    stage: str
    left: str
    right: str


@dataclass(frozen=True)
class Result:
    """The result of one run of an analysis, with its configuration and environment.

    Attributes:
        analysis: Name of the analysis, such as "kernel_distance".
        config: The full configuration; together with `seed` it suffices to run the analysis again.
        seed: Seed of every random choice.
        metrics: Numbers about kernels and pairs of kernels.
        tables: Further named tables, each a list of rows.
        arrays: Kernels, spectra and labels; a kernel is named "STAGE.KERNEL", its spectrum "spectrum.STAGE.KERNEL".
        model: Name and other identity of the model.
        dataset: Identity of the data, with "task" and "label_names" (None for regression) among its entries.
        environment: The value of `analyses.records.environment()`.
        seconds: Wall time of each step, in seconds.
        coverage: For each kernel, the parameters that it covers, in words with their count.
    """

    analysis: str
    config: dict[str, Any]
    seed: int
    metrics: list[Metric]
    tables: dict[str, list[dict[str, Any]]]
    arrays: dict[str, np.ndarray]
    model: dict[str, Any]
    dataset: dict[str, Any]
    environment: dict[str, Any]
    seconds: dict[str, Any]
    coverage: dict[str, str]

    def metric(self, name: str, *, stage: str, left: str, right: str = "") -> Metric:
        """Return the metric of that name for one kernel or one pair.

        Raises:
            RecordError: If this result does not hold it, or holds it more than once.
        """
        found = self._matching(name, stage, left, right)
        if len(found) != 1:
            pair = f"{left} and {right}" if right else left
            count = "no" if not found else f"{len(found)} times the"
            raise RecordError(f"the result holds {count} metric {name!r} of {pair} at stage {stage!r}")
        return found[0]

    def find(self, name: str, *, stage: str, left: str, right: str = "") -> Metric | None:
        """The first metric of that name for one kernel or one pair; None if this result does not hold it."""
        return next(iter(self._matching(name, stage, left, right)), None)

    def to_frame(self, table: str | None = None) -> Any:
        """The metrics as a pandas DataFrame, one row for each, or the rows of a table of this name.

        Raises:
            RecordError: If there is no such table, or pandas is not installed.
        """
        if table is not None and table not in self.tables:
            raise RecordError(f"the result holds no table {table!r}; its tables are {', '.join(self.tables) or 'none'}")
        try:
            import pandas
        except ImportError as error:
            raise RecordError("a data frame needs pandas: pip install pandas") from error
        rows = [vars(metric) for metric in self.metrics] if table is None else self.tables[table]
        return pandas.DataFrame(rows)

    def _matching(self, *key: str) -> list[Metric]:
        return [m for m in self.metrics if (m.name, m.stage, m.left, m.right) == key]


def plain(value: Any) -> Any:
    """Convert a value to types of strict JSON: not-finite numbers become None, other objects (a path) their text."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, np.generic | np.ndarray):
        return plain(value.tolist())
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((plain(entry) for entry in value), key=str)
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return str(value)
