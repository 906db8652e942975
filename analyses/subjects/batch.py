"""Tokenizes rows of a task into one padded batch."""

from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor

from propulsion.data import TaskData, located, tokenize
from propulsion.data.kinds.base import columns_of
from propulsion.data.sampling import draw
from propulsion.data.tasks import Task


def model_inputs(
    rows: Dataset, tokenizer: Any, task: Task, *, max_length: int | None = None, device: str = "cpu"
) -> dict[str, Tensor]:
    """Model inputs of rows of a task as one padded batch, without labels."""
    encoded = tokenize(rows, tokenizer, task, max_length)
    columns = {name: encoded[name] for name in encoded.column_names if name != "labels"}
    return {name: value.to(device) for name, value in tokenizer.pad(columns, return_tensors="pt").items()}


def labels_of(data: TaskData) -> np.ndarray:
    """The labels ``(n,)`` of all validation rows."""
    return np.asarray(data.validation[data.task.label_column])


def held_out(
    data: TaskData, tokenizer: Any, n: int, seed: int, *, max_length: int | None = None, device: str = "cpu"
) -> tuple[dict[str, Tensor], np.ndarray]:
    """Model inputs of n validation rows drawn with a seed, as one padded batch, and their n labels."""
    chosen = draw(data.task, "the validation rows", columns_of(data.validation), n, seed)
    rows = data.validation.select(chosen)

    def inputs() -> dict[str, Tensor]:
        return model_inputs(rows, tokenizer, data.task, max_length=max_length, device=device)

    return located(data, data.validation, inputs, chosen), np.asarray(rows[data.task.label_column])
