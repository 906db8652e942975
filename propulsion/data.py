"""Examples of a task, embedded or from files or the Hugging Face hub: checked, subsampled, tokenized."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from propulsion.errors import UserError, first_line
from propulsion.files import SUFFIXES, Columns, read_table
from propulsion.tasks import HUB_PATH, Task, get_task

LABEL = "label"
UNLABELLED = -1  # What GLUE's test sets hold in place of a label.


@dataclass(frozen=True)
class TaskData:
    """The examples of one run.

    Attributes:
        task: The task.
        train: Training rows: the text columns and `label`.
        validation: Held-out rows, in the same columns.
        source: Where the rows come from and how they were subsampled, in words.
        fingerprint: SHA-256 of the rows, so that two runs can be known to have used the same.
    """

    task: Task
    train: Dataset
    validation: Dataset
    source: str
    fingerprint: str


def load_task_data(
    task: str,
    *,
    data_dir: Path | str | None = None,
    n_train: int | None = None,
    n_validation: int | None = None,
    seed: int = 0,
) -> TaskData:
    """Load the training and validation rows of a task.

    Without `data_dir`, the task "demo" is embedded in the package and every other task comes from the hub.

    Args:
        task: Name of the task.
        data_dir: Folder with one `train` and one `validation` file (.jsonl, .json, .csv, .tsv or .parquet) in GLUE's
            column names. Labels are numbers, or the task's label names.
        n_train: Rows to draw at random for training; all if None.
        n_validation: Rows to draw at random for validation; all if None.
        seed: Seed of the draws. Draws are stratified: classes keep their proportions, each with one row at least.

    Raises:
        UserError: If the task is unknown, the data cannot be found or read, or a row cannot be used.
    """
    entry = get_task(task)
    if data_dir is not None:
        origin, splits = _read_folder(entry, Path(data_dir).expanduser())
    elif entry.hub_config is None:
        origin, splits = _read_embedded()
    else:
        origin, splits = _read_hub(entry)

    notes, rows = [], {}
    for (split, (name, columns)), n in zip(splits.items(), (n_train, n_validation)):
        checked = _check(entry, name, columns)
        rows[split] = _subsample(entry, name, checked, n, seed)
        total, used = len(checked[LABEL]), len(rows[split][LABEL])
        drawn = "" if used == total else f" drawn with seed {seed}"
        notes.append(f"{used} of {total} {split} rows{drawn}")
    return TaskData(
        task=entry,
        train=_to_dataset(entry, rows["train"]),
        validation=_to_dataset(entry, rows["validation"]),
        source=f"{origin}; {', '.join(notes)}",
        fingerprint=_fingerprint(rows),
    )


def draw_rows(data: Dataset, task: Task, n: int, seed: int) -> Dataset:
    """Draw n rows at random, keeping the classes' proportions as `load_task_data` does."""
    columns = {name: list(data[name]) for name in data.column_names}
    return _to_dataset(task, _subsample(task, "the validation rows", columns, n, seed))


def tokenize(data: Dataset, tokenizer: PreTrainedTokenizerBase, task: Task, max_length: int | None = None) -> Dataset:
    """Turn rows into model inputs, unpadded, with their labels as `labels` (int, or float for a regression).

    Args:
        data: Rows of the task, with or without labels.
        tokenizer: Tokenizer; its `model_max_length` is the longest input that its model takes.
        task: The task, for its text columns.
        max_length: Cut inputs to this many tokens. If None nothing is cut, and an input too long is an error.

    Raises:
        UserError: If an input is longer than the model takes and `max_length` is None, or if `max_length` is itself
            longer than that or leaves no room for text.
    """
    limit = tokenizer.model_max_length
    special = tokenizer.num_special_tokens_to_add(pair=len(task.text_columns) > 1)
    if max_length is not None and not special < max_length <= limit:
        raise UserError(f"max_length is {max_length}, expected {special + 1} to {limit} (the model's limit) tokens")
    texts = [list(data[column]) for column in task.text_columns]
    pairs = texts[1] if len(texts) > 1 else None
    # verbose=False: the tokenizer's own warning about long inputs is our error below.
    encoding = tokenizer(texts[0], pairs, truncation=max_length is not None, max_length=max_length, verbose=False)
    encoded = dict(encoding)
    lengths = [len(ids) for ids in encoded["input_ids"]]
    if longer := sum(length > limit for length in lengths):
        raise UserError(
            f"{longer} of {len(lengths)} examples are longer than the model's limit of {limit} tokens (longest: "
            f"{max(lengths)}); give max_length ({limit} or less) to truncate them"
        )
    if LABEL in data.column_names:
        encoded["labels"] = list(data[LABEL])
    return Dataset.from_dict(encoded)


def _read_embedded() -> tuple[str, dict[str, tuple[str, Columns]]]:
    with resources.as_file(resources.files("propulsion") / "demo_data") as folder:
        splits = {split: (split, read_table(folder / f"{split}.jsonl")) for split in ("train", "validation")}
    return "embedded demo data", splits


def _read_folder(task: Task, folder: Path) -> tuple[str, dict[str, tuple[str, Columns]]]:
    if not folder.is_dir():
        raise UserError(f"data folder {folder} does not exist or is not a folder")
    stems = {"train": ("train",), "validation": tuple(dict.fromkeys(("validation", task.validation_split)))}
    paths = {split: _find_file(folder, names) for split, names in stems.items()}
    return str(folder), {split: (str(path), read_table(path)) for split, path in paths.items()}


def _find_file(folder: Path, stems: Sequence[str]) -> Path:
    found = [path for stem in stems for suffix in SUFFIXES if (path := folder / f"{stem}{suffix}").is_file()]
    if not found:
        raise UserError(f"no {stems[0]} file in {folder}: looked for {' or '.join(stems)} with {', '.join(SUFFIXES)}")
    if len(found) > 1:
        raise UserError(f"ambiguous {stems[0]} file in {folder}: keep one of {', '.join(path.name for path in found)}")
    return found[0]


def _read_hub(task: Task) -> tuple[str, dict[str, tuple[str, Columns]]]:
    splits = {}
    for split, hub_split in (("train", "train"), ("validation", task.validation_split)):
        try:
            rows = datasets.load_dataset(HUB_PATH, task.hub_config, split=hub_split)
        except (OSError, ValueError) as error:  # Both what cannot be reached and what is not there.
            raise UserError(
                f"cannot get {HUB_PATH} ({task.hub_config}) from the Hugging Face hub: give --data-dir with train and "
                f"validation files, or set up network access ({first_line(error)})"
            ) from error
        splits[split] = (f"{HUB_PATH}/{task.hub_config} {hub_split}", rows[:])
    return f"Hugging Face hub, {HUB_PATH}/{task.hub_config}", splits


def _check(task: Task, name: str, columns: Columns) -> Columns:
    """Keep the task's columns, with texts and labels checked and labels as numbers."""
    wanted = (*task.text_columns, LABEL)
    if missing := [column for column in wanted if column not in columns]:
        found = ", ".join(columns) or "none"
        raise UserError(f"{name} lacks the column {', '.join(missing)} of task {task.name}; its columns are: {found}")
    if not columns[LABEL]:
        raise UserError(f"{name} has no rows")
    for column in task.text_columns:
        for row, text in enumerate(columns[column], start=1):
            if not isinstance(text, str):
                raise UserError(f"{name}, row {row}: {column} is {text!r}, expected text")
    read = _score if task.is_regression else _class
    labels = [read(task, value, f"{name}, row {row}") for row, value in enumerate(columns[LABEL], start=1)]
    if len(set(labels)) < 2:
        raise UserError(f"{name} has one label only ({labels[0]}): nothing can be learnt or measured from it")
    return {column: columns[column] for column in task.text_columns} | {LABEL: labels}


def _class(task: Task, value: Any, where: str) -> int:
    if value in task.label_names:
        return task.label_names.index(value)
    number = _number(value, where)
    if number not in range(task.num_labels):
        expected = ", ".join(f"{index} ({label})" for index, label in enumerate(task.label_names))
        raise UserError(f"{where}: label {value!r} is not one of {expected}")
    return int(number)


def _score(task: Task, value: Any, where: str) -> float:
    assert task.label_range is not None
    low, high = task.label_range
    number = _number(value, where)
    if not low <= number <= high:
        raise UserError(f"{where}: label {value!r} is outside {low} to {high}")
    return number


def _number(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise UserError(f"{where}: label {value!r} is not a number") from None
    if math.isnan(number):
        raise UserError(f"{where}: the label is missing (NaN)")
    if number == UNLABELLED:
        raise UserError(f"{where} is unlabelled (-1, as in GLUE's test sets): use a split with labels")
    return number


def _subsample(task: Task, name: str, columns: Columns, n: int | None, seed: int) -> Columns:
    labels = columns[LABEL]
    if n is None:
        return columns
    if not 1 <= n <= len(labels):
        raise UserError(f"cannot draw {n} rows from {name}: it has {len(labels)}")
    generator = np.random.default_rng(seed)
    if task.is_regression:
        chosen = generator.choice(len(labels), n, replace=False)
    else:
        chosen = _stratified(np.asarray(labels), n, generator, name)
    # In file order: the draw decides which rows are used, never their order.
    return {column: [values[i] for i in sorted(chosen.tolist())] for column, values in columns.items()}


def _stratified(labels: np.ndarray, n: int, generator: np.random.Generator, name: str) -> np.ndarray:
    """Draw n rows in the classes' proportions, by largest remainders, and one row of each class at least."""
    classes, counts = np.unique(labels, return_counts=True)
    if n < len(classes):
        raise UserError(f"cannot draw {n} rows from {name}: it has {len(classes)} classes, and each needs a row")
    exact = (n - len(classes)) * (counts - 1) / max(1, len(labels) - len(classes))
    quota = np.floor(exact).astype(int)
    rest = n - len(classes) - quota.sum()
    quota[np.argsort(quota - exact, kind="stable")[:rest]] += 1
    groups = [np.flatnonzero(labels == c) for c in classes]
    return np.concatenate([generator.choice(group, q + 1, replace=False) for group, q in zip(groups, quota)])


def _to_dataset(task: Task, columns: Columns) -> Dataset:
    kinds = {column: datasets.Value("string") for column in task.text_columns}
    kinds[LABEL] = datasets.Value("float32") if task.is_regression else datasets.Value("int64")
    return Dataset.from_dict(columns, features=datasets.Features(kinds))


def _fingerprint(rows: Mapping[str, Columns]) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
