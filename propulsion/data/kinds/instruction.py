"""Instructions to a language model, which is trained on the answer after the prompt and evaluated by generation."""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from propulsion.data.instructions import Exchange, extract
from propulsion.data.kinds.base import Kind, Limits, generate, input_limit, refuse_longer, rows_of
from propulsion.data.row_values import text, value_of
from propulsion.data.tables import Columns
from propulsion.data.tasks import Task
from propulsion.errors import UserError, one_line

IGNORED = -100
_PROMPT, _ANSWER, _CHOICES = "prompt", "answer", "choices"


def _features(task: Task) -> datasets.Features:
    text = datasets.Value("string")
    return datasets.Features({_PROMPT: text, _ANSWER: text, _CHOICES: datasets.List(text)})


def read(task: Task, row: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the columns of a row into prompt, answer and choices."""
    assert task.exchange is not None
    values = {column: value_of(row, column) for column in (*task.text_columns, task.label_column)}
    for column in task.text_columns:  # The function that makes the prompt would take None or a number for text.
        if not isinstance(values[column], (list, dict)):
            text(values[column], column, blank=True)
    try:
        exchange = task.exchange(values)
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise UserError(f"no row of task {task.name}: {one_line(error)}") from error
    return {_PROMPT: exchange.prompt, _ANSWER: exchange.answer, _CHOICES: list(exchange.choices)}


def encode(columns: Columns, tokenizer: PreTrainedTokenizerBase, task: Task, limits: Limits) -> Columns:
    """Tokens of prompt, answer and the end-of-text token; the labels leave the prompt out of the loss.

    If `max_length` is given, a prompt that leaves no room for its answer is cut at its beginning.
    """
    limit = input_limit(tokenizer, limits)
    prompts = tokenizer(list(columns[_PROMPT]), verbose=False)["input_ids"]
    answers = tokenizer([f" {a}" for a in columns[_ANSWER]], add_special_tokens=False, verbose=False)["input_ids"]
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    encoded: Columns = {"input_ids": [], "attention_mask": [], "labels": []}
    for prompt, answer in zip(prompts, answers):
        target = [*answer, *end]
        kept = prompt if limits.max_length is None else prompt[-max(1, limit - len(target)) :]
        ids = [*kept, *target]
        encoded["input_ids"].append(ids)
        encoded["attention_mask"].append([1] * len(ids))
        encoded["labels"].append([IGNORED] * len(kept) + target)
    refuse_longer([len(ids) for ids in encoded["input_ids"]], limits.longest(tokenizer))
    return encoded


def inputs(columns: Columns, tokenizer: PreTrainedTokenizerBase, task: Task, limits: Limits) -> Columns:
    """Tokens of the prompt; if `max_length` is given, they are cut at the beginning to leave room for new tokens."""
    limit = input_limit(tokenizer, limits) - limits.max_new_tokens
    if limit < 1:
        raise UserError(
            f"{limits.max_new_tokens} new tokens leave no room for a prompt in {input_limit(tokenizer, limits)}: lower "
            "max_target_length or generation_max_length"
        )
    prompts = tokenizer(list(columns[_PROMPT]), verbose=False)["input_ids"]
    if limits.max_length is None:
        refuse_longer([len(ids) + limits.max_new_tokens for ids in prompts], limits.longest(tokenizer))
    prompts = [ids[-limit:] for ids in prompts]
    return {"input_ids": prompts, "attention_mask": [[1] * len(ids) for ids in prompts]}


def predict(model: Any, tokenizer: PreTrainedTokenizerBase, task: Task, columns: Columns, limits: Limits) -> list[str]:
    """The text that the model generates after every prompt."""
    return generate(model, tokenizer, inputs(columns, tokenizer, task, limits), limits)


def exchanges_of(columns: Columns) -> list[Exchange]:
    """The prompts and answers of checked rows."""
    return [Exchange(row[_PROMPT], row[_ANSWER], tuple(row[_CHOICES])) for row in rows_of(columns)]


def measure(task: Task, predictions: Sequence[str], columns: Columns) -> dict[str, float]:
    """The share of rows whose generated text holds the right answer, and the share that holds any answer."""
    exchanges = exchanges_of(columns)
    right = [exchange.is_right(text) for exchange, text in zip(exchanges, predictions, strict=True)]
    answered = [extract(text, exchange.choices) is not None for exchange, text in zip(exchanges, predictions)]
    return {"accuracy": sum(right) / len(right), "answered": sum(answered) / len(answered)}


KIND = Kind(
    "CAUSAL_LM", _features, read, encode, inputs, predict, measure,
    collator=lambda tokenizer, model: DataCollatorForSeq2Seq(tokenizer),
)  # fmt: skip
