"""Summarisation: an encoder-decoder reads a document and generates its summary."""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from propulsion.data.kinds.base import Kind, Limits, generate, input_limit
from propulsion.data.metrics import rouge_scores
from propulsion.data.row_values import text, value_of
from propulsion.data.tables import Columns
from propulsion.data.tasks import Task
from propulsion.errors import UserError


def _features(task: Task) -> datasets.Features:
    return datasets.Features({name: datasets.Value("string") for name in (*task.text_columns, task.label_column)})


def read(task: Task, row: Mapping[str, Any]) -> dict[str, Any]:
    """Read the document and its summary."""
    return {column: text(value_of(row, column), column) for column in (*task.text_columns, task.label_column)}


def encode(columns: Columns, tokenizer: PreTrainedTokenizerBase, task: Task, limits: Limits) -> Columns:
    """Tokens of the document, cut to what the model takes, and of the summary, cut to `max_target_length`."""
    encoded = inputs(columns, tokenizer, task, limits)
    if task.label_column in columns:
        targets = list(columns[task.label_column])
        labels = tokenizer(text_target=targets, truncation=True, max_length=limits.max_target_length)
        encoded["labels"] = labels["input_ids"]
    return encoded


def inputs(columns: Columns, tokenizer: PreTrainedTokenizerBase, task: Task, limits: Limits) -> Columns:
    """Tokens of the document, cut to what the model takes."""
    limit, longest = input_limit(tokenizer, limits), max(limits.max_target_length, limits.max_new_tokens)
    if longest > limits.longest(tokenizer):
        raise UserError(f"summaries of up to {longest} tokens are longer than the model's limit of "
                        f"{limits.longest(tokenizer)}: lower max_target_length or generation_max_length")  # fmt: skip
    documents = tokenizer(list(columns[task.text_columns[0]]), truncation=True, max_length=limit)
    return {name: documents[name] for name in ("input_ids", "attention_mask")}


def predict(model: Any, tokenizer: PreTrainedTokenizerBase, task: Task, columns: Columns, limits: Limits) -> list[str]:
    """A summary of every document."""
    return generate(model, tokenizer, inputs(columns, tokenizer, task, limits), limits)


def measure(task: Task, predictions: Sequence[str], columns: Columns) -> dict[str, float]:
    """The task's ROUGE scores."""
    scores = rouge_scores(predictions, columns[task.label_column])
    return {name: scores[name] for name in task.metrics}


KIND = Kind(
    "SEQ_2_SEQ_LM", _features, read, encode, inputs, predict, measure,
    # The collator asks the model for the decoder's inputs, which are the labels shifted by one.
    collator=lambda tokenizer, model: DataCollatorForSeq2Seq(tokenizer, model=getattr(model, "base_model", model)),
)  # fmt: skip
