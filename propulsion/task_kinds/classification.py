"""Classification and regression: one label for a text or a pair of texts."""

import math
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from propulsion.errors import UserError
from propulsion.files import Columns
from propulsion.metrics import METRICS
from propulsion.task_kinds.base import Kind, Limits, check_columns, check_texts, input_limit, refuse_longer, run_batches
from propulsion.tasks import Task

UNLABELLED = -1  # What GLUE's test sets hold in place of a label.


def _features(task: Task) -> datasets.Features:
    kinds: dict[str, Any] = {column: datasets.Value("string") for column in task.text_columns}
    kinds[task.label_column] = datasets.Value("float32") if task.is_regression else datasets.Value("int64")
    return datasets.Features(kinds)


def check(task: Task, name: str, columns: Columns) -> Columns:
    """Keep the task's columns, with texts and labels checked and labels as numbers."""
    check_columns(task, name, columns)
    check_texts(name, columns, task.text_columns)
    read = _score if task.is_regression else _class
    values = columns[task.label_column]
    labels = [read(task, value, f"{name}, row {row}") for row, value in enumerate(values, start=1)]
    return {column: columns[column] for column in task.text_columns} | {task.label_column: labels}


def check_variety(name: str, labels: Sequence[Any]) -> None:
    """Raise `UserError` if all labels are the same."""
    if len(set(labels)) < 2:
        raise UserError(f"{name} has one label only ({labels[0]}): nothing can be learnt or measured from it")


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


def encode(columns: Columns, tokenizer: PreTrainedTokenizerBase, task: Task, limits: Limits) -> Columns:
    """Tokens of the texts, unpadded, with labels where there are any.

    Raises:
        UserError: An input is longer than the model takes and `max_length` is None, or `max_length` is out of range.
    """
    input_limit(tokenizer, limits, pair=len(task.text_columns) > 1)
    texts = [list(columns[column]) for column in task.text_columns]
    pairs = texts[1] if len(texts) > 1 else None
    # verbose=False: the tokenizer's own warning about long inputs is our error below.
    encoded = dict(
        tokenizer(
            texts[0], pairs, truncation=limits.max_length is not None, max_length=limits.max_length, verbose=False
        )
    )
    refuse_longer([len(ids) for ids in encoded["input_ids"]], tokenizer.model_max_length)
    if task.label_column in columns:
        encoded["labels"] = list(columns[task.label_column])
    return encoded


def logits(
    model: Any, tokenizer: PreTrainedTokenizerBase, task: Task, columns: Columns, limits: Limits
) -> list[list[float]]:
    """The model's outputs, one list a row."""
    encoded = encode(columns, tokenizer, task, limits)
    encoded.pop("labels", None)
    return [row[0].tolist() for row in run_batches(model, tokenizer, encoded, limits.batch_size, ("logits",))]


def predict(
    model: Any, tokenizer: PreTrainedTokenizerBase, task: Task, columns: Columns, limits: Limits
) -> list[float] | list[int]:
    """The class, or the score, of every row."""
    outputs = logits(model, tokenizer, task, columns, limits)
    return [row[0] for row in outputs] if task.is_regression else [int(np.argmax(row)) for row in outputs]


def measure(task: Task, predictions: Sequence[Any], columns: Columns) -> dict[str, float]:
    """The task's metrics."""
    arrays = np.asarray(predictions), np.asarray(columns[task.label_column])
    return {name: METRICS[name](*arrays) for name in task.metrics}


def _collator(tokenizer: PreTrainedTokenizerBase, model: Any) -> DataCollatorWithPadding:
    return DataCollatorWithPadding(tokenizer)


KIND = Kind("SEQ_CLS", _features, check, encode, _collator, predict, measure)
