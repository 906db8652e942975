"""Turns rows into model inputs: tokenizes them, checks them against the model's limits, and caches them."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow.lib
from datasets import Dataset, IterableDataset, config
from transformers import PreTrainedTokenizerBase

from propulsion.checksums import sha256_of
from propulsion.data.kinds import Limits, kind_of
from propulsion.data.kinds.base import columns_of
from propulsion.data.loading import TaskData
from propulsion.data.tables import Columns
from propulsion.data.tasks import Task
from propulsion.errors import Problems, Unusable, listed, together
from propulsion.identity import content_identity, tokenizer_identity

_BATCH = 256  # Streamed rows tokenized at once.


def tokenize(data: Dataset, tokenizer: PreTrainedTokenizerBase, task: Task, max_length: int | None = None) -> Dataset:
    """Turn rows of a task into unpadded model inputs, with labels if the rows have them.

    Inputs are cut to `max_length` tokens. If it is None nothing is cut, and an input longer than the tokenizer's
    `model_max_length` is an error, except for kinds of tasks that cut it or split it (`propulsion.data.kinds`).

    Raises:
        UserError: If an input is longer than the model takes and `max_length` is None, or if `max_length` is itself
            longer than that or leaves no room for text.
    """
    return Dataset.from_dict(kind_of(task).encode(columns_of(data), tokenizer, task, Limits(max_length)))


def check_inputs(
    data: TaskData, tokenizer: PreTrainedTokenizerBase, limits: Limits, *, cached: bool = False, streamed: int = 0
) -> Dataset | IterableDataset:
    """Return the training rows as model inputs after a check that every row of both splits fits the model.

    Of streamed training rows, the first `streamed` ones are read once for this check, and not kept. With `cached`,
    `tokenize_cached` is used; this requires data as they were loaded, since the cache is keyed by their fingerprint.

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

    each = together(partial(located, data, data.train, train), partial(located, data, data.validation, validation))
    return each[0]


def located(data: TaskData, rows: Dataset, call: Callable[[], Any], chosen: Sequence[int] | None = None) -> Any:
    """Call a function of some rows; if it cannot use some, the exception names their file and location in it.

    Args:
        data: The data.
        rows: Its training or validation rows.
        call: The function.
        chosen: The indices of the rows that the function is called on; all of them if None.

    Raises:
        Problems: The function raised `Unusable`.
    """
    try:
        return call()
    except Unusable as error:
        split = "training rows" if rows is data.train else "validation rows"
        origin = next((origin for origin in data.origins if origin.rows is rows), None)
        examples = error.examples if chosen is None else [chosen[example] for example in error.examples]
        which = listed([f"example {row + 1}" if origin is None else origin.locations[row] for row in examples])
        raise Problems(
            [f"{split if origin is None else origin.name}: {error.what}: {which}"], [error.remedy]
        ) from error


def tokenize_cached(
    data: TaskData, tokenizer: PreTrainedTokenizerBase, limits: Limits, cache_dir: Path | None = None
) -> Dataset | IterableDataset:
    """Training rows as model inputs, read from the file of an earlier run if there is one.

    Streamed rows are encoded as they are read. Files are in `cache_dir`, by default a folder in the cache of
    `datasets`; each is named by a hash of the rows, the tokenizer and the lengths, and by its own checksum. A file
    that is not that of its checksum is removed, and written again.

    Raises:
        UserError: As `tokenize` does.
    """
    options: Any = {"batched": True, "remove_columns": data.train.column_names}
    encode = partial(_encode, tokenizer=tokenizer, task=data.task, limits=limits)
    if data.stream is not None:
        streamed = partial(_encode_streamed, encode)
        return data.stream.map(streamed, with_indices=True, batch_size=_BATCH, **options)
    folder = cache_dir or Path(config.HF_DATASETS_CACHE) / "propulsion-tokenized"
    lengths = limits.max_length, limits.max_target_length
    key = content_identity([data.fingerprint, data.task.name, tokenizer_identity(tokenizer), *lengths])[:32]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in folder.glob(f"{key}.*.arrow"):
            if file.name == _cache_name(key, file):
                return Dataset.from_file(str(file))
            file.unlink()
        written = folder / f".{key}-{os.getpid()}.arrow"
        with _without_progress_bar():
            rows = data.train.map(encode, batch_size=None, cache_file_name=str(written), new_fingerprint=key, **options)
        if written.is_file():  # Without rows, no file is written.
            os.replace(written, folder / _cache_name(key, written))
        return rows
    except (OSError, pyarrow.lib.ArrowInvalid):  # The cache cannot be written, or its file is damaged.
        return Dataset.from_dict(encode(data.train[:]))


def _cache_name(key: str, file: Path) -> str:
    return f"{key}.{sha256_of(file)}.arrow"


def _encode(batch: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, task: Task, limits: Limits) -> Columns:
    return kind_of(task).encode(dict(batch), tokenizer, task, limits)


def _encode_streamed(encode: Callable[[Columns], Columns], batch: Columns, indices: list[int]) -> Columns:
    try:
        return encode(batch)
    except Unusable as error:
        which = listed([f"example {indices[example] + 1}" for example in error.examples])
        raise Problems([f"streamed training rows: {error.what}: {which}"], [error.remedy]) from error


@contextlib.contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Disable the progress bars of `datasets` in the block, since training shows its own."""
    if datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
