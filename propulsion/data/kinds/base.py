"""The interface of a kind of task, and functions that several kinds share."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from propulsion.data.tables import Columns
from propulsion.data.tasks import Task
from propulsion.errors import Unusable, UserError


@dataclass(frozen=True)
class Limits:
    """Limits on lengths, and the batch size of predictions.

    Attributes:
        max_length: Cut inputs to this many tokens. If None nothing is cut, and an input that is too long is an error,
            except for summaries and answers.
        max_target_length: Cut summaries to this many tokens; without `generate_length`, also generate no more.
        batch_size: Rows of a batch in prediction.
        generate_length: Generate no more than this many tokens.
        num_beams: Beams of the search for generated text; 1 is greedy.
    """

    max_length: int | None = None
    max_target_length: int = 64
    batch_size: int = 64
    generate_length: int | None = None
    num_beams: int = 1

    @property
    def max_new_tokens(self) -> int:
        """How many tokens are generated at most."""
        return self.max_target_length if self.generate_length is None else self.generate_length


@dataclass(frozen=True)
class Kind:
    """One kind of task, as a set of functions.

    Attributes:
        task_type: peft's name of the task type, which determines the head of the model.
        features: task -> types of its columns.
        read: (task, row of a file) -> values of the task's columns; raises a `UserError` that names the column.
        encode: (columns, tokenizer, task, limits) -> unpadded model inputs with labels, possibly several for a row;
            raises `Unusable` for rows that are too long.
        inputs: The same without labels; `predict` calls the model with them.
        predict: (model, tokenizer, task, columns, limits) -> one prediction a row.
        measure: (task, predictions, columns) -> the task's metrics.
        trivial: (task, columns) -> predictions made without a model, one a row, such as empty texts.
        collator: (tokenizer, model) -> a function that pads encoded rows to a batch.
    """

    task_type: str
    features: Callable[[Task], datasets.Features]
    read: Callable[[Task, Mapping[str, Any]], dict[str, Any]]
    encode: Callable[[Columns, PreTrainedTokenizerBase, Task, Limits], Columns]
    inputs: Callable[[Columns, PreTrainedTokenizerBase, Task, Limits], Any]
    predict: Callable[[Any, PreTrainedTokenizerBase, Task, Columns, Limits], list[Any]]
    measure: Callable[[Task, Sequence[Any], Columns], dict[str, float]]
    trivial: Callable[[Task, Columns], list[Any]] = lambda task, columns: [""] * len(next(iter(columns.values())))
    collator: Callable[[Any, Any], Any] = lambda tokenizer, model: DataCollatorWithPadding(tokenizer)


def input_limit(tokenizer: PreTrainedTokenizerBase, limits: Limits, *, pair: bool = False) -> int:
    """The length in tokens that an input may have: `max_length` if given, else the model's limit.

    Raises:
        UserError: `max_length` is more than the model takes, or too little for any text.
    """
    limit = tokenizer.model_max_length
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    if limits.max_length is not None and not special < limits.max_length <= limit:
        raise UserError(
            f"max_length is {limits.max_length}, expected {special + 1} to {limit} (the model's limit) tokens"
        )
    return limit if limits.max_length is None else limits.max_length


def refuse_longer(lengths: Sequence[int], limit: int) -> None:
    """Check that no input is longer than the model takes.

    Raises:
        Unusable: Some inputs are longer; the exception holds their indices.
    """
    if longer := [row for row, length in enumerate(lengths) if length > limit]:
        raise Unusable(
            f"{len(longer)} of {len(lengths)} examples are longer than the model's limit of {limit} tokens (longest: "
            f"{max(lengths)})",
            longer,
            f"give max_length ({limit} or less) to truncate them, or shorten them",
        )


def rows_of(columns: Columns) -> list[dict[str, Any]]:
    """The rows of a table that is given by its columns."""
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def columns_of(data: datasets.Dataset) -> Columns:
    """The columns of a dataset as lists of plain Python values."""
    return {name: list(data[name]) for name in data.column_names}


def _padded_batches(model: Any, tokenizer: PreTrainedTokenizerBase, encoded: Columns, size: int) -> Iterator[Any]:
    """Batches of at most `size` encoded rows, on the model's device."""
    for start in range(0, len(encoded["input_ids"]), size):
        rows = {name: values[start : start + size] for name, values in encoded.items()}
        yield tokenizer.pad(rows, return_tensors="pt").to(model.device)


@torch.no_grad()
def run_batches(
    model: Any, tokenizer: PreTrainedTokenizerBase, encoded: Columns, size: int, outputs: Sequence[str]
) -> list[tuple[torch.Tensor, ...]]:
    """Run a model on encoded rows in evaluation mode, and return the named outputs of every row, on the CPU.

    Rows come back padded to their batch's length.
    """
    mode = model.training
    model.eval()
    rows = []
    try:
        for batch in _padded_batches(model, tokenizer, encoded, size):
            output = model(**batch)
            rows += zip(*(getattr(output, name).float().cpu() for name in outputs))
    finally:
        model.train(mode)
    return rows


@torch.no_grad()
def generate(model: Any, tokenizer: PreTrainedTokenizerBase, encoded: Columns, limits: Limits) -> list[str]:
    """Continue every encoded row by greedy or beam search, and return the new text of each."""
    mode, side = model.training, tokenizer.padding_side
    cached = getattr(model.config, "use_cache", None)
    model.eval()
    texts = []
    is_decoder = not model.config.is_encoder_decoder
    try:
        if is_decoder:
            tokenizer.padding_side = "left"  # New text follows the prompt's last token, in every row.
        if cached is not None:
            model.config.use_cache = True  # Gradient checkpointing turns it off, which makes generation slow.
        for batch in _padded_batches(model, tokenizer, encoded, limits.batch_size):
            ids = model.generate(
                **batch, max_new_tokens=limits.max_new_tokens, do_sample=False, num_beams=limits.num_beams,
                pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
            new = ids[:, batch["input_ids"].shape[1] :] if is_decoder else ids
            texts += tokenizer.batch_decode(new, skip_special_tokens=True)
    finally:
        tokenizer.padding_side = side
        if cached is not None:
            model.config.use_cache = cached
        model.train(mode)
    return [text.strip() for text in texts]
