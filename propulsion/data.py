"""Examples of a task, embedded or from files or the Hugging Face hub: checked, subsampled, tokenized."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, IterableDataset
from datasets import config as datasets_config
from transformers import PreTrainedTokenizerBase

from propulsion.errors import UserError, first_line
from propulsion.files import SUFFIXES, Columns, read_table, stream_table
from propulsion.task_kinds import Limits, kind_of
from propulsion.task_kinds.base import columns_of
from propulsion.task_kinds.classification import check_variety
from propulsion.tasks import Task, get_task

LABEL = "label"
SPLITS = ("train", "validation")
_STREAMED_AT_ONCE = 256


@dataclass(frozen=True)
class TaskData:
    """The examples of one run.

    Attributes:
        task: The task.
        train: Training rows in the task's columns (of an instruction: prompt, answer, choices); none if streamed.
        validation: Held-out rows, in the same columns.
        source: Where the rows come from and how they were subsampled, in words.
        fingerprint: SHA-256 of the rows, so that two runs can be known to have used the same; of streamed training
            rows, of their source alone.
        stream: Training rows, read as they are needed, where that was asked for.
    """

    task: Task
    train: Dataset
    validation: Dataset
    source: str
    fingerprint: str
    stream: IterableDataset | None = None


def load_task_data(
    task: str,
    *,
    data_dir: Path | str | None = None,
    n_train: int | None = None,
    n_validation: int | None = None,
    seed: int = 0,
    streaming: bool = False,
) -> TaskData:
    """Load the training and validation rows of a task.

    Without `data_dir`, the task "demo" is embedded in the package and every other task comes from the hub.

    Args:
        task: Name of the task.
        data_dir: Folder with one `train` and one `validation` file (.jsonl, .json, .csv, .tsv or .parquet) in the
            column names of the hub. Labels are numbers, or the task's label names.
        n_train: Rows to draw at random for training; all if None. Of streamed rows, the first.
        n_validation: Rows to draw at random for validation; all if None.
        seed: Seed of the draws. Draws are stratified: classes keep their proportions, each with one row at least.
        streaming: Read training rows as they are needed, and hold none; they are checked as they come.

    Raises:
        UserError: If the task is unknown, the data cannot be found or read, or a row cannot be used.
    """
    entry = get_task(task)
    source = _source(entry, data_dir, streaming)
    notes, rows = [], {}
    for split, n in zip(SPLITS, (n_train, n_validation)):
        if streaming and split == "train":
            notes.append(f"train rows streamed{'' if n is None else f', the first {n}'}")
            continue
        name, columns = source.read(split)
        checked = kind_of(entry).check(entry, name, columns)
        label = _label_column(entry)
        if label is not None:
            check_variety(name, checked[label])
        rows[split] = _subsample(entry, name, checked, n, seed)
        total, used = (len(next(iter(table.values()))) for table in (checked, rows[split]))
        drawn = "" if used == total else f" drawn with seed {seed}"
        notes.append(f"{used} of {total} {split} rows{drawn}")
    if streaming:
        rows["train"] = {name: [] for name in kind_of(entry).features(entry)}
    return TaskData(
        task=entry,
        train=to_dataset(entry, rows["train"]),
        validation=to_dataset(entry, rows["validation"]),
        source=f"{source.origin}; {', '.join(notes)}",
        fingerprint=_fingerprint(rows | ({"streamed": source.origin} if streaming else {})),
        stream=_stream(entry, source, n_train) if streaming else None,
    )


def draw_rows(data: Dataset, task: Task, n: int, seed: int) -> Dataset:
    """Draw n rows at random, keeping the classes' proportions as `load_task_data` does."""
    return to_dataset(task, _subsample(task, "the validation rows", columns_of(data), n, seed))


def to_dataset(task: Task, columns: Columns) -> Dataset:
    """Checked columns as a dataset of the task's own types."""
    return Dataset.from_dict(columns, features=kind_of(task).features(task))


def tokenize(data: Dataset, tokenizer: PreTrainedTokenizerBase, task: Task, max_length: int | None = None) -> Dataset:
    """Turn rows into model inputs, unpadded, with their labels.

    Args:
        data: Rows of the task, with or without labels.
        tokenizer: Tokenizer; its `model_max_length` is the longest input that its model takes.
        task: The task.
        max_length: Cut inputs to this many tokens. If None nothing is cut, and an input too long is an error, except
            for kinds of tasks that say otherwise (`propulsion.task_kinds`).

    Raises:
        UserError: If an input is longer than the model takes and `max_length` is None, or if `max_length` is itself
            longer than that or leaves no room for text.
    """
    return Dataset.from_dict(kind_of(task).encode(columns_of(data), tokenizer, task, Limits(max_length)))


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
            lambda batch: kind.encode(batch, tokenizer, data.task, limits),
            batched=True, batch_size=_STREAMED_AT_ONCE, remove_columns=list(kind.features(data.task)),
        )  # fmt: skip
    folder = cache_dir or Path(datasets_config.HF_DATASETS_CACHE) / "propulsion-tokenized"
    path = folder / _tokens_key(data, tokenizer, limits)
    try:
        return datasets.load_from_disk(str(path))  # pyright: ignore[reportReturnType]
    except (OSError, ValueError, KeyError):
        pass  # Not there, or of another version: made again.
    encoded = Dataset.from_dict(kind.encode(columns_of(data.train), tokenizer, data.task, limits))
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        encoded.save_to_disk(str(partial))
        os.rename(partial, path)
    except OSError:  # A cache that cannot be written, or was written by another process meanwhile, costs time alone.
        shutil.rmtree(partial, ignore_errors=True)
    return encoded


def _tokens_key(data: TaskData, tokenizer: PreTrainedTokenizerBase, limits: Limits) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    for state in ("truncation", "padding"):  # Left there by the last call, whatever it was.
        vocabulary.pop(state, None)
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    parts = (
        data.fingerprint, data.task.name, type(tokenizer).__name__, vocabulary, special, tokenizer.model_max_length,
        limits.max_length, limits.max_target_length,
    )  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


# --- sources --------------------------------------------------------------------------------------------------------


class _Source:
    """Where the splits of a task are."""

    def __init__(self, task: Task, origin: str) -> None:
        self.task, self.origin = task, origin

    def read(self, split: str) -> tuple[str, Columns]:
        """A split's name in messages, and all of its columns."""
        raise NotImplementedError

    def stream(self, split: str) -> tuple[str, Iterator[Columns]]:
        """A split's name in messages, and its columns by the batch."""
        raise UserError(f"{self.origin} cannot be streamed: leave streaming out")


class _Embedded(_Source):
    def read(self, split: str) -> tuple[str, Columns]:
        with resources.as_file(resources.files("propulsion") / "demo_data") as folder:
            return split, read_table(folder / f"{split}.jsonl")


class _Folder(_Source):
    def __init__(self, task: Task, folder: Path) -> None:
        super().__init__(task, str(folder))
        if not folder.is_dir():
            raise UserError(f"data folder {folder} does not exist or is not a folder")
        stems = {"train": ("train",), "validation": tuple(dict.fromkeys(("validation", task.validation_split)))}
        self.paths = {split: _find_file(folder, names) for split, names in stems.items()}

    def read(self, split: str) -> tuple[str, Columns]:
        return str(self.paths[split]), read_table(self.paths[split])

    def stream(self, split: str) -> tuple[str, Iterator[Columns]]:
        return str(self.paths[split]), stream_table(self.paths[split], _STREAMED_AT_ONCE)


class _Hub(_Source):
    def __init__(self, task: Task) -> None:
        self.name = f"{task.hub_path}/{task.hub_config}" if task.hub_config else str(task.hub_path)
        super().__init__(task, f"Hugging Face hub, {self.name}")

    def _load(self, split: str, **options: Any) -> tuple[str, Any]:
        task = self.task
        hub_split = task.train_split if split == "train" else task.validation_split
        try:
            assert task.hub_path is not None
            rows = datasets.load_dataset(
                task.hub_path, task.hub_config, split=hub_split, revision=task.hub_revision, **options
            )
        except (OSError, ValueError, RuntimeError) as error:  # Both what cannot be reached and what is not there.
            shown = f"{task.hub_path} ({task.hub_config})" if task.hub_config else str(task.hub_path)
            raise UserError(
                f"cannot get {shown} from the Hugging Face hub: give --data-dir with train and "
                f"validation files, or set up network access ({first_line(error)})"
            ) from error
        return f"{self.name} {hub_split}", rows

    def read(self, split: str) -> tuple[str, Columns]:
        name, rows = self._load(split)
        if self.task.name == "snli":  # Some pairs have no label that people agreed on.
            rows = rows.filter(lambda row: row[LABEL] >= 0)
        return name, rows[:]

    def stream(self, split: str) -> tuple[str, Iterator[Columns]]:
        name, rows = self._load(split, streaming=True)
        return name, rows.iter(batch_size=_STREAMED_AT_ONCE)


def _source(task: Task, data_dir: Path | str | None, streaming: bool) -> _Source:
    if data_dir is not None:
        return _Folder(task, Path(data_dir).expanduser())
    if task.name == "demo":
        return _Embedded(task, "embedded demo data")
    if task.hub_path is None:
        raise UserError(f"task {task.name} has no home on the Hugging Face hub: give --data-dir with its files")
    return _Hub(task)


def _find_file(folder: Path, stems: Sequence[str]) -> Path:
    found = [path for stem in stems for suffix in SUFFIXES if (path := folder / f"{stem}{suffix}").is_file()]
    if not found:
        raise UserError(f"no {stems[0]} file in {folder}: looked for {' or '.join(stems)} with {', '.join(SUFFIXES)}")
    if len(found) > 1:
        raise UserError(f"ambiguous {stems[0]} file in {folder}: keep one of {', '.join(path.name for path in found)}")
    return found[0]


def _stream(task: Task, source: _Source, n: int | None) -> IterableDataset:
    kind = kind_of(task)
    columns = kind.features(task)

    def rows() -> Iterator[dict[str, Any]]:
        seen = 0
        name, found = source.stream("train")
        for batch in found:
            checked = kind.check(task, f"{name}, after row {seen}", batch)
            for values in zip(*checked.values()):
                if n is not None and seen >= n:
                    return
                seen += 1
                yield dict(zip(checked, values))

    source.stream("train")  # What cannot be opened is said now.
    return IterableDataset.from_generator(rows, features=columns)


# --- drawing rows ---------------------------------------------------------------------------------------------------


def _label_column(task: Task) -> str | None:
    """The column of single labels, in tasks that have one."""
    return task.label_column if task.kind in ("classification", "regression") else None


def _subsample(task: Task, name: str, columns: Columns, n: int | None, seed: int) -> Columns:
    if n is None:
        return columns
    total = len(next(iter(columns.values())))
    if not 1 <= n <= total:
        raise UserError(f"cannot draw {n} rows from {name}: it has {total}")
    generator = np.random.default_rng(seed)
    if task.kind == "classification":
        chosen = _stratified(np.asarray(columns[task.label_column]), n, generator, name)
    else:
        chosen = generator.choice(total, n, replace=False)
    # In file order: the draw decides which rows are used, never their order.
    return {column: [values[i] for i in sorted(chosen.tolist())] for column, values in columns.items()}


def _stratified(labels: np.ndarray, n: int, generator: np.random.Generator, name: str) -> np.ndarray:
    """Draw n rows in the classes' proportions, by largest remainders, and one row of each class at least."""
    classes, counts = np.unique(labels, return_counts=True)
    if n < len(classes):
        raise UserError(f"cannot draw {n} rows from {name}: it has {len(classes)} classes, and each needs a row")
    exact = (n - len(classes)) * (counts - 1) / max(1, len(labels) - len(classes))
    quota = np.floor(exact).astype(int)
    rest = n - len(classes) - quota.sum()
    quota[np.argsort(quota - exact, kind="stable")[:rest]] += 1
    groups = [np.flatnonzero(labels == c) for c in classes]
    return np.concatenate([generator.choice(group, q + 1, replace=False) for group, q in zip(groups, quota)])


def _fingerprint(rows: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
