"""Classification and regression: one label for a text or a pair of texts."""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from propulsion.data.kinds.base import Kind, Limits, input_limit, refuse_longer, run_batches
from propulsion.data.metrics import METRICS
from propulsion.data.row_values import NoText, label_number, label_text, named_label, score, text, value_of
from propulsion.data.tables import Columns
from propulsion.data.tasks import OwnTask, Task
from propulsion.errors import UserError


def _features(task: Task) -> datasets.Features:
    kinds: dict[str, Any] = {column: datasets.Value("string") for column in task.text_columns}
    kinds[task.label_column] = datasets.Value("float32") if task.is_regression else datasets.Value("int64")
    return datasets.Features(kinds)


def read(task: Task, row: Mapping[str, Any]) -> dict[str, Any]:
    """Read the task's columns, the label as a number. One of two texts may be empty."""
    values = {column: text(value_of(row, column), column, blank=True) for column in task.text_columns}
    if not any(value.strip() for value in values.values()):
        raise NoText(f"no text in {' or '.join(task.text_columns)}")
    label, column = value_of(row, task.label_column), task.label_column
    if isinstance(task, OwnTask) and label_text(label) is None:
        raise UserError(f"the {column} is missing: label the row, or leave it out")
    if task.label_range is not None:
        return values | {column: score(label, *task.label_range, column)}
    number = named_label if isinstance(task, OwnTask) else label_number
    return values | {column: number(label, task.label_names, column)}


def check_variety(name: str, labels: Sequence[Any]) -> None:
    """Raise a `UserError` if all labels are the same."""
    if len(set(labels)) < 2:
        raise UserError(f"{name} has one label only ({labels[0]}): nothing can be learnt or measured from it")


def encode(columns: Columns, tokenizer: PreTrainedTokenizerBase, task: Task, limits: Limits) -> Columns:
    """Unpadded tokens of the texts, with labels if the columns have them.

    Raises:
        Unusable: An input is longer than the model takes and `max_length` is None.
        UserError: `max_length` is out of range.
    """
    encoded = inputs(columns, tokenizer, task, limits)
    if task.label_column in columns:
        encoded["labels"] = list(columns[task.label_column])
    return encoded


def inputs(columns: Columns, tokenizer: PreTrainedTokenizerBase, task: Task, limits: Limits) -> Columns:
    """Unpadded tokens of the texts, as `encode` returns them, without labels."""
    input_limit(tokenizer, limits, pair=len(task.text_columns) > 1)
    texts = [list(columns[column]) for column in task.text_columns]
    pairs = texts[1] if len(texts) > 1 else None
    cut = limits.max_length is not None
    # verbose=False silences the tokenizer's warning about long inputs, which are an error below.
    encoded = tokenizer(texts[0], pairs, truncation=cut, max_length=limits.max_length, verbose=False)
    refuse_longer([len(ids) for ids in encoded["input_ids"]], limits.longest(tokenizer))
    return dict(encoded)


def logits(
    model: Any, tokenizer: PreTrainedTokenizerBase, task: Task, columns: Columns, limits: Limits
) -> list[list[float]]:
    """The outputs of the model, one list for each row."""
    encoded = inputs(columns, tokenizer, task, limits)
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


def trivial(task: Task, columns: Columns) -> list[int]:
    """The first class, or 0, for every row."""
    return [0] * len(columns[task.label_column])


KIND = Kind("SEQ_CLS", _features, read, encode, inputs, predict, measure, trivial)
