"""Summarisation by an encoder-decoder: a document in, its summary out."""

from collections.abc import Sequence
from typing import Any

import datasets
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from propulsion.files import Columns
from propulsion.metrics import rouge_scores
from propulsion.task_kinds.base import Kind, Limits, check_columns, check_texts, generate, input_limit
from propulsion.tasks import Task


def _features(task: Task) -> datasets.Features:
    return datasets.Features({name: datasets.Value("string") for name in (*task.text_columns, task.label_column)})


def check(task: Task, name: str, columns: Columns) -> Columns:
    """Keep documents and summaries, which are texts."""
    wanted = (*task.text_columns, task.label_column)
    check_columns(task, name, columns)
    check_texts(name, columns, wanted)
    return {column: columns[column] for column in wanted}


def encode(columns: Columns, tokenizer: PreTrainedTokenizerBase, task: Task, limits: Limits) -> Columns:
    """Tokens of the document, cut to what the model takes, and of the summary, cut to `max_target_length`."""
    limit = input_limit(tokenizer, limits)
    documents = tokenizer(list(columns[task.text_columns[0]]), truncation=True, max_length=limit)
    encoded: Columns = {name: documents[name] for name in ("input_ids", "attention_mask")}
    if task.label_column in columns:
        targets = list(columns[task.label_column])
        labels = tokenizer(text_target=targets, truncation=True, max_length=limits.max_target_length)
        encoded["labels"] = labels["input_ids"]
    return encoded


def predict(model: Any, tokenizer: PreTrainedTokenizerBase, task: Task, columns: Columns, limits: Limits) -> list[str]:
    """A summary of every document."""
    encoded = encode(columns, tokenizer, task, limits)
    encoded.pop("labels", None)
    return generate(model, tokenizer, encoded, limits)


def measure(task: Task, predictions: Sequence[str], columns: Columns) -> dict[str, float]:
    """ROUGE, the headline first."""
    found = rouge_scores(predictions, columns[task.label_column])
    return {name: found[name] for name in task.metrics}


def _collator(tokenizer: PreTrainedTokenizerBase, model: Any) -> DataCollatorForSeq2Seq:
    # The model makes the decoder's inputs of the labels, shifted by one.
    return DataCollatorForSeq2Seq(tokenizer, model=getattr(model, "base_model", model))


KIND = Kind("SEQ_2_SEQ_LM", _features, check, encode, _collator, predict, measure)
