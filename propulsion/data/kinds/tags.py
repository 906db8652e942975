"""Token classification: one tag for every word."""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
from transformers import DataCollatorForTokenClassification, PreTrainedTokenizerBase

from propulsion.data.kinds.base import Kind, Limits, input_limit, refuse_longer, run_batches
from propulsion.data.metrics import entity_scores
from propulsion.data.row_values import NoText, label_number, shown, texts, value_of
from propulsion.data.tables import Columns
from propulsion.data.tasks import Task
from propulsion.errors import UserError

IGNORED = -100
OUTSIDE = "O"


def _features(task: Task) -> datasets.Features:
    words, tags = datasets.List(datasets.Value("string")), datasets.List(datasets.Value("int64"))
    return datasets.Features({task.text_columns[0]: words, task.label_column: tags})


def read(task: Task, row: Mapping[str, Any]) -> dict[str, Any]:
    """Keep words and tags, one tag a word, tags as numbers; they may come as their names."""
    words_column, tags_column = task.text_columns[0], task.label_column
    words, tags = texts(value_of(row, words_column), words_column, "words"), value_of(row, tags_column)
    if "" in words:
        raise NoText(f"item {words.index('') + 1} of {words_column} is '', expected a word")
    if not isinstance(tags, list) or len(tags) != len(words):
        raise UserError(f"expected {len(words)} {tags_column}, one a word, found {shown(tags)}")
    return {words_column: words, tags_column: [label_number(tag, task.label_names, "tag") for tag in tags]}


def encode(columns: Columns, tokenizer: PreTrainedTokenizerBase, task: Task, limits: Limits) -> Columns:
    """Tokens of the words; a word's tag stands at its first token, and its other tokens have none."""
    input_limit(tokenizer, limits)
    if not tokenizer.is_fast:
        raise UserError("tagging words needs a fast tokenizer, which says which token belongs to which word")
    batch = tokenizer(
        list(columns[task.text_columns[0]]), is_split_into_words=True, truncation=limits.max_length is not None,
        max_length=limits.max_length, verbose=False,
    )  # fmt: skip
    encoded = dict(batch)
    refuse_longer([len(ids) for ids in encoded["input_ids"]], tokenizer.model_max_length)
    if task.label_column in columns:
        encoded["labels"] = [
            [IGNORED if word is None else tags[word] for word in _first_tokens(batch.word_ids(row))]
            for row, tags in enumerate(columns[task.label_column])
        ]
    return encoded


def _first_tokens(word_ids: Sequence[int | None]) -> list[int | None]:
    """The word that starts at each token; None at special tokens and inside words."""
    return [word if place == 0 or word_ids[place - 1] != word else None for place, word in enumerate(word_ids)]


def inputs(columns: Columns, tokenizer: PreTrainedTokenizerBase, task: Task, limits: Limits) -> Columns:
    """Tokens of the words, with a word's number in the place of its tag: which word starts at each token."""
    words = columns[task.text_columns[0]]
    numbered = {task.text_columns[0]: words, task.label_column: [range(len(row)) for row in words]}
    return encode(numbered, tokenizer, task, limits)


def predict(
    model: Any, tokenizer: PreTrainedTokenizerBase, task: Task, columns: Columns, limits: Limits
) -> list[list[str]]:
    """A tag for every word, by name; words that were cut off are outside any entity."""
    encoded, words_column = inputs(columns, tokenizer, task, limits), task.text_columns[0]
    places = encoded.pop("labels")
    found = []
    outputs = run_batches(model, tokenizer, encoded, limits.batch_size, ("logits",))
    for words, starts, (row,) in zip(columns[words_column], places, outputs, strict=True):
        tags = [OUTSIDE] * len(words)
        offset = len(row) - len(starts) if tokenizer.padding_side == "left" else 0
        for place, word in enumerate(starts):
            if word != IGNORED:
                tags[word] = task.label_names[int(row[offset + place].argmax())]
        found.append(tags)
    return found


def measure(task: Task, predictions: Sequence[Sequence[str]], columns: Columns) -> dict[str, float]:
    """Scores of whole entities."""
    labels = [[task.label_names[tag] for tag in tags] for tags in columns[task.label_column]]
    return entity_scores(predictions, labels)


def silent(task: Task, columns: Columns) -> list[list[str]]:
    """No entities."""
    return [["O"] * len(tags) for tags in columns[task.label_column]]


def _collator(tokenizer: PreTrainedTokenizerBase, model: Any) -> DataCollatorForTokenClassification:
    return DataCollatorForTokenClassification(tokenizer)


KIND = Kind("TOKEN_CLS", _features, read, encode, inputs, _collator, predict, measure, silent)
