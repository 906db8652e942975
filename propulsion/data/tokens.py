"""Rows as the inputs of a model: tokenized, checked against its limits, and cached."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, IterableDataset
from datasets import config as datasets_config
from transformers import PreTrainedTokenizerBase

from propulsion.data.kinds import Limits, kind_of
from propulsion.data.kinds.base import columns_of
from propulsion.data.loading import TaskData
from propulsion.data.tables import Columns
from propulsion.data.tasks import Task
from propulsion.errors import Problems, Unusable, listed, together
from propulsion.identity import tokenizer_identity

_BATCH = 256  # Streamed rows tokenized at once.


def tokenize(data: Dataset, tokenizer: PreTrainedTokenizerBase, task: Task, max_length: int | None = None) -> Dataset:
    """Turn rows into model inputs, unpadded, with their labels.

    Args:
        data: Rows of the task, with or without labels.
        tokenizer: Tokenizer; its `model_max_length` is the longest input that its model takes.
        task: The task.
        max_length: Cut inputs to this many tokens. If None nothing is cut, and an input too long is an error, except
            for kinds of tasks that say otherwise (`propulsion.data.kinds`).

    Raises:
        UserError: If an input is longer than the model takes and `max_length` is None, or if `max_length` is itself
            longer than that or leaves no room for text.
    """
    return Dataset.from_dict(kind_of(task).encode(columns_of(data), tokenizer, task, Limits(max_length)))


def check_inputs(
    data: TaskData, tokenizer: PreTrainedTokenizerBase, limits: Limits, *, cached: bool = False, streamed: int = 0
) -> Dataset | IterableDataset:
    """Training rows as model inputs, after every row of both splits was found to fit the model.

    Of streamed training rows, those that will be needed are read once for this, and not kept.

    Args:
        data: The task's data.
        tokenizer: The tokenizer.
        limits: Lengths.
        cached: Whether training rows come from an earlier run's file where there is one (`tokenize_cached`): only of
            data as they were loaded, which their fingerprint stands for.
        streamed: How many streamed training rows to look at.

    Raises:
        UserError: As `tokenize` does, of rows of both splits together.
    """
    kind, task = kind_of(data.task), data.task

    def train() -> Dataset | IterableDataset:
        if cached or data.stream is not None:
            encoded = tokenize_cached(data, tokenizer, limits)
            if isinstance(encoded, IterableDataset):
                for _ in encoded.take(streamed):
                    pass
            return encoded
        return Dataset.from_dict(kind.encode(columns_of(data.train), tokenizer, task, limits))

    def validation() -> object:
        return kind.inputs(columns_of(data.validation), tokenizer, task, limits)

    each = together(partial(_located, data, data.train, train), partial(_located, data, data.validation, validation))
    return each[0]


def _located(data: TaskData, rows: Dataset, call: Callable[[], Any]) -> Any:
    """Call, and name the rows that cannot be used by their places."""
    try:
        return call()
    except Unusable as error:
        split = "training rows" if rows is data.train else "validation rows"
        known = [places for places in data.places if places.rows is rows]
        name = known[0].name if known else split
        numbers = known[0].numbers if known else [f"example {place + 1}" for place in range(len(rows))]
        which = listed([numbers[place] for place in error.examples])
        raise Problems([f"{name}: {error.what}: {which}"], [error.remedy]) from error


def tokenize_cached(
    data: TaskData, tokenizer: PreTrainedTokenizerBase, limits: Limits, cache_dir: Path | None = None
) -> Dataset | IterableDataset:
    """Training rows as model inputs: from an earlier run's file where there is one, or lazily where they are streamed.

    Args:
        data: The task's data.
        tokenizer: The tokenizer.
        limits: Lengths.
        cache_dir: Folder of the files; by default within that of `datasets`. A file is known by the rows, the
            tokenizer and the lengths.

    Raises:
        UserError: As `tokenize` does.
    """
    kind = kind_of(data.task)
    if data.stream is not None:
        return data.stream.map(
            partial(_encode_streamed, tokenizer=tokenizer, task=data.task, limits=limits),
            with_indices=True, batched=True, batch_size=_BATCH,
            remove_columns=list(kind.features(data.task)),
        )  # fmt: skip
    folder = cache_dir or Path(datasets_config.HF_DATASETS_CACHE) / "propulsion-tokenized"
    path = folder / _tokens_key(data, tokenizer, limits)
    try:
        return datasets.load_from_disk(str(path))  # pyright: ignore[reportReturnType]
    except (OSError, ValueError, KeyError):
        pass  # Not there, or of another version: made again.
    encoded = Dataset.from_dict(kind.encode(columns_of(data.train), tokenizer, data.task, limits))
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        encoded.save_to_disk(str(unfinished))
        os.rename(unfinished, path)
    except OSError:  # A cache that cannot be written, or was written by another process meanwhile, costs time alone.
        shutil.rmtree(unfinished, ignore_errors=True)
    return encoded


def _encode_streamed(
    batch: Columns, places: list[int], tokenizer: PreTrainedTokenizerBase, task: Task, limits: Limits
) -> Columns:
    try:
        return kind_of(task).encode(batch, tokenizer, task, limits)
    except Unusable as error:
        which = listed([f"example {places[place] + 1}" for place in error.examples])
        raise Problems([f"streamed training rows: {error.what}: {which}"], [error.remedy]) from error


def _tokens_key(data: TaskData, tokenizer: PreTrainedTokenizerBase, limits: Limits) -> str:
    parts = (
        data.fingerprint, data.task.name, tokenizer_identity(tokenizer), limits.max_length, limits.max_target_length,
    )  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
