"""The interface of a kind of task, and functions that several kinds share."""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from torch import nn
from transformers import DataCollatorWithPadding, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from propulsion.data.tables import Columns
from propulsion.data.tasks import Task
from propulsion.errors import NotFinite, Unusable, UserError


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
        reserved: Tokens of the model's limit that its method takes for itself, as virtual tokens of prompts.
    """

    max_length: int | None = None
    max_target_length: int = 64
    batch_size: int = 64
    generate_length: int | None = None
    num_beams: int = 1
    reserved: int = 0

    def __post_init__(self) -> None:
        for name in ("max_target_length", "batch_size", "num_beams"):
            if not getattr(self, name) >= 1:
                raise UserError(f"{name} is {getattr(self, name)}, expected at least 1")

    def longest(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """The longest input in tokens that the model takes.

        Raises:
            UserError: The method leaves no room for inputs.
        """
        room = tokenizer.model_max_length - self.reserved
        if room <= tokenizer.num_special_tokens_to_add():
            raise UserError(
                f"the method's {self.reserved} virtual tokens leave no room for texts in the model's limit of "
                f"{tokenizer.model_max_length} tokens: lower num_virtual_tokens"
            )
        return room

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
    limit = limits.longest(tokenizer)
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


_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients in the block; the mode of every module is restored.

    Threads that evaluate the same model wait for one another: otherwise one of them would restore the training mode
    while another still predicts. A thread that trains the model at the same time is not kept out.
    """
    with _LOCKS_LOCK:
        lock = _LOCKS.setdefault(model, threading.RLock())
    with lock, torch.no_grad():
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def run_batches(
    model: Any, tokenizer: PreTrainedTokenizerBase, encoded: Columns, size: int, outputs: Sequence[str], *,
    by_token: bool = False,
) -> list[tuple[torch.Tensor, ...]]:  # fmt: skip
    """Run a model on encoded rows in evaluation mode, and return the named outputs of every row, on the CPU.

    Rows come back padded to their batch's length. With `by_token`, the second axis of the outputs is that of tokens,
    and outputs at padding may have any value.

    Raises:
        NotFinite: An output is not finite.
    """
    rows = []
    with evaluating(model):
        for batch in _padded_batches(model, tokenizer, encoded, size):
            output = model(**batch)
            values = [getattr(output, name).float().cpu() for name in outputs]
            real = batch["attention_mask"].bool().cpu() if by_token else None
            for value in values:
                _check_finite(model, value, real, len(rows))
            rows += zip(*values)
    return rows


def _check_finite(model: nn.Module, values: torch.Tensor, real: torch.Tensor | None, before: int) -> None:
    """Check the outputs of a batch, ``(n, ...)``, at the real tokens ``(n, t)`` if these are given."""
    wrong = ~values.isfinite()
    if real is not None:
        wrong = wrong & real.reshape(*real.shape, *(1,) * (wrong.ndim - 2))
    if wrong.any():
        example = before + int(wrong.flatten(1).any(dim=1).nonzero()[0]) + 1
        raise not_finite(model, f"example {example}")


def not_finite(model: nn.Module, where: str) -> NotFinite:
    """The error to raise if outputs of a model are not finite, which would be scored as if they were predictions."""
    damaged = (name for name, weight in model.named_parameters() if not weight.isfinite().all())
    if (name := next(damaged, None)) is not None:
        cause = f"{name} holds values that are not finite: load or train it again"
    else:
        cause = "its activations overflow: use a wider dtype, such as float32"
    return NotFinite(f"the model's outputs are not finite for {where}, so that nothing can be predicted; {cause}")


class _FiniteScores(LogitsProcessor):
    """Raises `NotFinite` if the scores of the next token are not finite; those of forbidden tokens are -inf."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not scores.amax(dim=-1).isfinite().all():
            raise not_finite(self._model, "generated text")
        return scores


def generate(model: Any, tokenizer: PreTrainedTokenizerBase, encoded: Columns, limits: Limits) -> list[str]:
    """Continue every encoded row by greedy or beam search, and return the new text of each.

    Raises:
        NotFinite: The scores of the next token are not finite.
    """
    texts = []
    is_decoder = not model.config.is_encoder_decoder
    with evaluating(model):
        side, cached = tokenizer.padding_side, getattr(model.config, "use_cache", None)
        try:
            if is_decoder:
                tokenizer.padding_side = "left"  # New text follows the prompt's last token, in every row.
            if cached is not None:
                model.config.use_cache = True  # Gradient checkpointing turns it off, which makes generation slow.
            for batch in _padded_batches(model, tokenizer, encoded, limits.batch_size):
                ids = model.generate(
                    **batch, max_new_tokens=limits.max_new_tokens, do_sample=False, num_beams=limits.num_beams,
                    pad_token_id=tokenizer.pad_token_id, logits_processor=LogitsProcessorList([_FiniteScores(model)]),
                )  # fmt: skip
                new = ids[:, batch["input_ids"].shape[1] :] if is_decoder else ids
                texts += tokenizer.batch_decode(new, skip_special_tokens=True)
        finally:
            tokenizer.padding_side = side
            if cached is not None:
                model.config.use_cache = cached
    return [text.strip() for text in texts]
