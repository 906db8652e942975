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
    """Read the words of a row and their tags, one tag for each word, given as a number or a name."""
    words_column, tags_column = task.text_columns[0], task.label_column
    words, tags = texts(value_of(row, words_column), words_column, "words"), value_of(row, tags_column)
    if "" in words:
        raise NoText(f"item {words.index('') + 1} of {words_column} is '', expected a word")
    if not isinstance(tags, list) or len(tags) != len(words):
        raise UserError(f"expected {len(words)} {tags_column}, one a word, found {shown(tags)}")
    return {words_column: words, tags_column: [label_number(tag, task.label_names, "tag") for tag in tags]}


def encode(columns: Columns, tokenizer: PreTrainedTokenizerBase, task: Task, limits: Limits) -> Columns:
    """Tokens of the words, with the tag of a word as the label of its first token; other tokens have no label."""
    input_limit(tokenizer, limits)
    if not tokenizer.is_fast:
        raise UserError("tagging words needs a fast tokenizer, which says which token belongs to which word")
    batch = tokenizer(
        list(columns[task.text_columns[0]]), is_split_into_words=True, truncation=limits.max_length is not None,
        max_length=limits.max_length, verbose=False,
    )  # fmt: skip
    encoded = dict(batch)
    refuse_longer([len(ids) for ids in encoded["input_ids"]], limits.longest(tokenizer))
    if task.label_column in columns:
        encoded["labels"] = [
            [IGNORED if word is None else tags[word] for word in _first_tokens(batch.word_ids(row))]
            for row, tags in enumerate(columns[task.label_column])
        ]
    return encoded


def _first_tokens(word_ids: Sequence[int | None]) -> list[int | None]:
    """For each token, the index of the word that starts there; None at special tokens and inside words."""
    return [word if token == 0 or word_ids[token - 1] != word else None for token, word in enumerate(word_ids)]


def inputs(columns: Columns, tokenizer: PreTrainedTokenizerBase, task: Task, limits: Limits) -> Columns:
    """Tokens of the words; the label of a token is the index of the word that starts there."""
    words = columns[task.text_columns[0]]
    numbered = {task.text_columns[0]: words, task.label_column: [range(len(row)) for row in words]}
    return encode(numbered, tokenizer, task, limits)


def predict(
    model: Any, tokenizer: PreTrainedTokenizerBase, task: Task, columns: Columns, limits: Limits
) -> list[list[str]]:
    """The name of a tag for every word; words that were cut off get the tag "O", which stands for no entity."""
    encoded, words_column = inputs(columns, tokenizer, task, limits), task.text_columns[0]
    word_starts = encoded.pop("labels")
    predictions = []
    outputs = run_batches(model, tokenizer, encoded, limits.batch_size, ("logits",), by_token=True)
    for words, starts, (row,) in zip(columns[words_column], word_starts, outputs, strict=True):
        tags = [OUTSIDE] * len(words)
        offset = len(row) - len(starts) if tokenizer.padding_side == "left" else 0
        for token, word in enumerate(starts):
            if word != IGNORED:
                tags[word] = task.label_names[int(row[offset + token].argmax())]
        predictions.append(tags)
    return predictions


def measure(task: Task, predictions: Sequence[Sequence[str]], columns: Columns) -> dict[str, float]:
    """Scores of whole entities."""
    labels = [[task.label_names[tag] for tag in tags] for tags in columns[task.label_column]]
    return entity_scores(predictions, labels)


def trivial(task: Task, columns: Columns) -> list[list[str]]:
    """The tag "O" for every word, which stands for no entity."""
    return [[OUTSIDE] * len(tags) for tags in columns[task.label_column]]


KIND = Kind(
    "TOKEN_CLS", _features, read, encode, inputs, predict, measure, trivial,
    lambda tokenizer, model: DataCollatorForTokenClassification(tokenizer),
)  # fmt: skip
