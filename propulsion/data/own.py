"""Tasks made from the columns of a user's labelled rows.

The rows are one file, or a folder with a train and perhaps a validation file (`propulsion.data.sources.own_files`), or
a dataset on the Hugging Face hub by its name, ``--data-dir OWNER/NAME`` (`propulsion.data.hub`).
Which column holds what is said by options (``--text-columns text --label-column label``), or by a small file that can
be used again (``--task-file topics.toml``):

    data_dir = "topics"            # a folder, or a file, relative to this file; or OWNER/NAME on the hub
    text_columns = ["text"]        # one column, or two for a pair of texts
    label_column = "topic"
    # optional: name, kind ("classification" or "regression"), label_names, metrics

Labels are counted over all rows. They are classes if they are texts, or at most `MOST_CLASSES` whole numbers; otherwise
they are real numbers, and the task is a regression. Classes are in alphabetical order, and in numerical order if all
names are numbers.
"""

import dataclasses
import json
import math
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from propulsion.data.hub import hub_name
from propulsion.data.metrics import METRICS
from propulsion.data.row_values import as_number, label_text, shown
from propulsion.data.sources import own_tables
from propulsion.data.tables import Table
from propulsion.data.tasks import OWN_TASKS, TASKS, OwnTask
from propulsion.errors import UserError, did_you_mean, explained, first_line, listed
from propulsion.user_files import expanded

MOST_CLASSES = 20
"""More different whole numbers than these are the values of a regression, not classes."""
DEGREE = 15
"""Propulsion's degree; the paper gives none for other tasks than its own, and this one for most of its own."""
_KEYS = ("name", "data_dir", "text_columns", "label_column", "kind", "label_names", "metrics")
_METRICS = {"classification": ("accuracy", "matthews"), "regression": ("pearson", "spearman")}


@dataclass(frozen=True)
class RowOptions:
    """The source of a task's rows."""

    data_dir: Path | None = None
    """Folder of the task's files, or of several tasks' folders; without it, the Hugging Face hub. With text-columns, a
    folder or one file of your own rows, or the name OWNER/NAME of a dataset on the hub."""
    text_columns: tuple[str, ...] = ()
    """Rows of your own: the column of the text, or two columns for a pair of texts. The task is made from the rows."""
    label_column: str | None = None
    """Rows of your own: the column of the label, which is the name or number of a class, or a real number."""
    task_file: Path | None = None
    """Rows of your own: a .toml, .json or .yaml file that says all this (propulsion.data.own)."""


ROW_OPTIONS = frozenset(field.name for field in dataclasses.fields(RowOptions)) - {"data_dir"}
"""Options that make a task; the task and the content of its rows identify what is computed from them."""

C = TypeVar("C")


def with_own_task(config: C) -> C:
    """The configuration of a run with the task that its options make, which `get_task` knows from then on.

    The options are those of `RowOptions`, in the configuration or in one within it. Its field `task`, or `tasks`, then
    names the task, and `data_dir` its rows. A configuration without these options is returned as it is.

    Raises:
        UserError: The options, the file or the rows cannot be used, or another task is named too.
    """
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}  # pyright: ignore[reportArgumentType]
    holders = [None, *(name for name, value in values.items() if dataclasses.is_dataclass(value))]
    for holder in holders:
        options: Any = config if holder is None else values[holder]
        if not isinstance(options, RowOptions) or (made := own_task(options)) is None:
            continue
        task, data_dir = made
        changes: dict[str, Any] = {}
        for name, own in (("task", task.name), ("tasks", (task.name,))):
            if name in values:
                _refuse_another(config, name, values[name], own)
                changes[name] = own
        if holder is None:
            changes["data_dir"] = data_dir
        else:
            changes[holder] = dataclasses.replace(options, data_dir=data_dir)
        return dataclasses.replace(config, **changes)  # pyright: ignore[reportArgumentType, reportReturnType]
    return config


def _refuse_another(config: Any, name: str, value: Any, own: Any) -> None:
    """Raise if a task other than the default one is named beside rows of one's own."""
    default = next(field.default for field in dataclasses.fields(config) if field.name == name)
    if value not in (default, own):
        named = value if isinstance(value, str) else " ".join(value)
        raise UserError(
            f"--{name} names {named}, and --text-columns or --task-file name rows of your own: leave one of them out"
        )


def own_task(options: RowOptions) -> tuple[OwnTask, Path] | None:
    """The task that options make, and the place of its rows; None if the options name no columns and no file.

    Raises:
        UserError: An option is missing, or the file or the rows cannot be used.
    """
    given: dict[str, Any] = {} if options.task_file is None else read_task_file(options.task_file)
    own = {"data_dir": options.data_dir, "text_columns": options.text_columns, "label_column": options.label_column}
    given |= {name: value for name, value in own.items() if value not in (None, ())}
    if not options.text_columns and options.label_column is None and options.task_file is None:
        return None
    options_of = {"text_columns": "--text-columns", "label_column": "--label-column", "data_dir": "--data-dir"}
    for name, option in options_of.items():
        if name not in given:
            raise UserError(
                f"rows of your own need {option} too: give --data-dir, --text-columns, --label-column, or --task-file"
            )
    place = Path(given["data_dir"])
    return task_from_columns(place, **{k: v for k, v in given.items() if k != "data_dir"}), place


def task_from_columns(
    data_dir: Path | str,
    *,
    text_columns: Sequence[str],
    label_column: str,
    name: str | None = None,
    kind: str | None = None,
    label_names: Sequence[str] = (),
    metrics: Sequence[str] = (),
) -> OwnTask:
    """Make a task from the columns of labelled rows, and let `get_task` know it.

    Args:
        data_dir: The folder or the file of the rows, or the name of a dataset on the hub.
        text_columns: The column of the text, or the two columns of a pair.
        label_column: The column of the label.
        name: Name of the task; by default that of the folder or file.
        kind: "classification" or "regression"; by default what the labels look like.
        label_names: Names of the classes in order; by default all labels in alphabetical or numerical order.
        metrics: Names of metrics (`propulsion.data.metrics.METRICS`), the main one first; by default accuracy and
            Matthews correlation, or Pearson and Spearman correlation.

    Raises:
        UserError: A column is missing, the rows have no labels or one label only, or an argument cannot be used.
    """
    columns = (text_columns,) if isinstance(text_columns, str) else tuple(text_columns)
    if not 1 <= len(columns) <= 2 or len({*columns, label_column}) != len(columns) + 1:
        raise UserError(f"expected one text column, or two, and another one for labels; got {[*columns, label_column]}")
    if kind not in (None, "classification", "regression"):
        raise UserError(f"kind is {kind!r}, expected classification or regression")
    if unknown := [metric for metric in metrics if metric not in METRICS]:
        close = did_you_mean(unknown[0], METRICS)
        raise UserError(f"there is no metric {unknown[0]!r}{close}, expected one of {', '.join(METRICS)}")
    tables = own_tables(data_dir)
    where = str(data_dir)
    labels = [value for table in tables.values() for value in _labels(table, columns, label_column)]
    texts = [text for value in labels if (text := label_text(value)) is not None]
    if not texts:
        raise UserError(
            f"{where} has no labels in the column {label_column}: name the column that has them, or use "
            "propulsion.predict for rows without labels"
        )
    numbers = [as_number(text) for text in texts]
    is_regression = kind == "regression" or (kind is None and not label_names and _are_real(numbers))
    found = Counter(texts)
    if len(found) < 2:
        raise UserError(f"{where} has one label only ({shown(texts[0])}): nothing can be learnt or measured from it")
    shared: dict[str, Any] = {"name": name or _name_of(Path(data_dir)), "text_columns": columns, "degree": DEGREE,
                              "label_column": label_column}  # fmt: skip
    if is_regression:
        if (at := next((i for i, n in enumerate(numbers) if n is None or not math.isfinite(n)), None)) is not None:
            raise UserError(f"{where}: a label of a regression is {shown(texts[at])}, which is not a finite number")
        finite = [number for number in numbers if number is not None]
        task = OwnTask(label_names=(), metrics=tuple(metrics) or _METRICS["regression"], kind="regression",
                       label_range=(min(finite), max(finite)), **shared)  # fmt: skip
    else:
        names = tuple(map(str, label_names)) or _names(found, where, label_column)
        task = OwnTask(label_names=names, metrics=tuple(metrics) or _METRICS["classification"], **shared)
    OWN_TASKS[task.name] = task
    return task


def read_task_file(path: Path | str) -> dict[str, Any]:
    """The entries of a task file: arguments of `task_from_columns`, with `data_dir` relative to the file's folder.

    Raises:
        UserError: The file cannot be read, or has an entry that is unknown or of another type.
    """
    path = expanded(path)
    readers = {".toml": tomllib.loads, ".json": json.loads, ".yaml": yaml.safe_load, ".yml": yaml.safe_load}
    if path.suffix.lower() not in readers:
        raise UserError(f"task file {path} is of an unknown format: expected {', '.join(readers)}")
    with explained(f"read the task file {path}"):
        text = path.read_text(encoding="utf-8", errors="replace")
    try:
        content = readers[path.suffix.lower()](text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"task file {path} cannot be read: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"task file {path} holds {type(content).__name__}, expected entries such as text_columns")
    if unknown := [str(key) for key in content if key not in _KEYS]:
        close = did_you_mean(unknown[0], _KEYS)
        raise UserError(f"task file {path} has an unknown entry {unknown[0]!r}{close}; known are {', '.join(_KEYS)}")
    for key, value in content.items():
        many = key in ("text_columns", "label_names", "metrics")
        if many and isinstance(value, str):
            content[key] = value = [value]
        # Names of classes may be numbers.
        types = (str, int, float) if key == "label_names" else (str,)
        if not all(isinstance(one, types) for one in (value if many and isinstance(value, list) else [value])):
            raise UserError(f"task file {path}: {key} is {shown(value)}, expected {'a list of texts' * many or 'text'}")
    if "data_dir" in content:
        place = path.parent / expanded(content["data_dir"])
        is_on_hub = not place.exists() and hub_name(content["data_dir"]) is not None
        content["data_dir"] = Path(content["data_dir"]) if is_on_hub else place
    return content


def _labels(table: Table, text_columns: Sequence[str], label_column: str) -> Iterable[Any]:
    """The values in the column of labels of a table, after a check that all columns are there, and labels in all rows.

    A table without any labels passes.
    """
    seen: dict[str, None] = {}
    values, missing = [], []
    for row in table.read():
        if row.problem is None:  # A row that cannot be read is reported when the rows are loaded.
            seen |= dict.fromkeys(row.values)
            values.append(row.values.get(label_column))
            if label_text(values[-1]) is None:
                missing.append(row.location)
    for column in (*text_columns, label_column):
        if seen and column not in seen:
            raise UserError(
                f"{table.name} has no column {column}{did_you_mean(column, seen)}; its columns are: {listed([*seen])}"
            )
    if 0 < len(missing) < len(values):
        raise UserError(
            f"{table.name}: {len(missing)} of {len(values)} rows have no {label_column}: {listed(missing)}; label "
            "them, or leave them out and use propulsion.predict for them"
        )
    return values


def _are_real(numbers: Sequence[float | None]) -> bool:
    """Whether labels are real numbers, as those of a regression, and not numbers of classes."""
    if any(number is None for number in numbers):
        return False
    whole = all(number == int(number) for number in numbers if number is not None and math.isfinite(number))
    return not whole or len(set(numbers)) > MOST_CLASSES


def _names(found: Mapping[str, int], where: str, column: str) -> tuple[str, ...]:
    """The names of classes in order, of the counts of all labels."""
    total = sum(found.values())
    if len(found) > MOST_CLASSES and 2 * len(found) > total:
        raise UserError(
            f"{where} has {len(found)} different labels in {total} rows of the column {column}: is it the column of "
            "the labels?"
        )
    alike: dict[str, str] = {}
    for name in sorted(found):
        if (other := alike.setdefault(name.casefold(), name)) != name:
            raise UserError(f"{where}: the labels {other!r} and {name!r} differ in case only; write them alike")
    numbers = {name: as_number(name) for name in found}
    if all(number is not None for number in numbers.values()):
        return tuple(sorted(found, key=lambda name: (numbers[name], name)))
    return tuple(sorted(found))


def _name_of(path: Path) -> str:
    """The name of a task whose rows are at a path: that of the folder or file, without its suffix."""
    stem = path.expanduser().resolve().name
    stem = stem if path.is_dir() else stem.partition(".")[0]
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", stem).strip("_") or "rows"
    return f"own_{name}" if name in TASKS else name
