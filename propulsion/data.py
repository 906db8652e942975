"""Examples of a task, embedded or from files or the Hugging Face hub: checked, subsampled, tokenized."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, IterableDataset
from datasets import config as datasets_config
from transformers import PreTrainedTokenizerBase

from propulsion.errors import Problems, Unusable, UserError, first_line, listed, together
from propulsion.files import SUFFIXES, Columns, Row, read_rows, rows_of_batches, suffix_of
from propulsion.identity import tokenizer_identity
from propulsion.row_values import NoText
from propulsion.task_kinds import Limits, kind_of
from propulsion.task_kinds.base import columns_of
from propulsion.task_kinds.classification import check_variety
from propulsion.tasks import Task, get_task

LABEL = "label"
EMBEDDED = "demo"
"""The task whose rows come with the package."""
SPLITS = ("train", "validation")
_STREAMED_AT_ONCE = 256


@dataclass(frozen=True)
class Places:
    """Where rows come from, for messages.

    Attributes:
        rows: The rows.
        name: The file, or the split of a dataset on the hub.
        numbers: Where each row stands there.
    """

    rows: Dataset
    name: str
    numbers: Sequence[str]


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
        places: Where the rows come from, of those that were loaded.
    """

    task: Task
    train: Dataset
    validation: Dataset
    source: str
    fingerprint: str
    stream: IterableDataset | None = None
    places: tuple[Places, ...] = ()


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
        data_dir: Folder with one `train` and one `validation` file in the column names of the hub: .jsonl, .json, .csv
            or .tsv, as they are or compressed (.gz, .bz2, .xz), or .parquet; or a folder with such a folder in it,
            named after the task. Labels are numbers, or the task's label names in any case. Other columns are not read.
        n_train: Rows to draw at random for training; all if None. Of streamed rows, the first.
        n_validation: Rows to draw at random for validation; all if None.
        seed: Seed of the draws. Draws are stratified: classes keep their proportions, each with one row at least.
        streaming: Read training rows as they are needed, and hold none; they are checked as they come.

    Raises:
        UserError: If the task is unknown, the data cannot be found or read, or rows cannot be used; all such rows of
            both splits are counted, and the first of them named.
    """
    entry = get_task(task)
    source = _source(entry, data_dir, streaming)
    sizes = {split: n for split, n in zip(SPLITS, (n_train, n_validation)) if not (streaming and split == "train")}
    found = together(*(partial(_read_split, entry, source, split, n, seed) for split, n in sizes.items()))
    rows, notes = {split: columns for split, (columns, _, _, _) in zip(sizes, found)}, [note for *_, note in found]
    if streaming:
        notes.insert(0, f"train rows streamed{'' if n_train is None else f', the first {n_train}'}")
        rows["train"] = {name: [] for name in kind_of(entry).features(entry)}
    sets = {split: to_dataset(entry, columns) for split, columns in rows.items()}
    return TaskData(
        task=entry,
        train=sets["train"],
        validation=sets["validation"],
        source=f"{source.origin}; {', '.join(notes)}",
        fingerprint=_fingerprint(rows | ({"streamed": source.origin} if streaming else {})),
        stream=_stream(entry, source, n_train) if streaming else None,
        places=tuple(Places(sets[split], name, numbers) for split, (_, name, numbers, _) in zip(sizes, found)),
    )


def _read_split(
    task: Task, source: "_Source", split: str, n: int | None, seed: int
) -> tuple[Columns, str, list[str], str]:
    """The rows of a split that are used, its name, their places in it, and how they were chosen, in words."""
    name, rows = source.read(split)
    columns, numbers, left_out = _checked(task, name, rows, leave_out=source.leaves_out_blank)
    if (label := _label_column(task)) is not None:
        check_variety(name, columns[label])
    chosen = _drawn(task, name, columns, n, seed)
    note = f"{len(chosen)} of {len(numbers)} {split} rows"
    note += "" if len(chosen) == len(numbers) else f" drawn with seed {seed}"
    note += f" ({left_out} without text left out)" if left_out else ""
    return _select(columns, chosen), name, [numbers[place] for place in chosen], note


def _checked(task: Task, name: str, rows: Iterable[Row], *, leave_out: bool) -> tuple[Columns, list[str], int]:
    """Rows as the task's columns, their places, and the number of those left out for want of text.

    Raises:
        UserError: Rows cannot be used, or there are none; all are read before the first few are named.
    """
    columns: Columns = {column: [] for column in kind_of(task).features(task)}
    numbers, problems, seen, left_out, unread = [], [], {}, 0, 0
    for row in rows:
        seen |= dict.fromkeys(row.values)
        unread += row.problem is not None
        try:
            read = _read_row(task, row)
        except UserError as error:
            if leave_out and isinstance(error, NoText):
                left_out += 1
            else:
                problems.append(f"{row.place}: {error}")
        else:
            numbers.append(row.place)
            for column, values in columns.items():
                values.append(read[column])
    total = len(numbers) + len(problems)
    if not total:
        raise UserError(f"{name} has no rows")
    if not unread and (missing := [column for column in (*task.text_columns, task.label_column) if column not in seen]):
        raise UserError(
            f"{name} lacks the column {', '.join(missing)} of task {task.name}; its columns are: {', '.join(seen)}"
        )
    if len(problems) == 1:
        raise UserError(f"{name}, {problems[0]}")
    if problems:
        raise UserError(f"{name}: {len(problems)} of {total} rows cannot be used: {listed(problems, '; ')}")
    return columns, numbers, left_out


def _read_row(task: Task, row: Row) -> dict[str, Any]:
    if row.problem is not None:
        raise UserError(row.problem)
    return kind_of(task).read(task, row.values)


def draw_rows(data: Dataset, task: Task, n: int, seed: int) -> Dataset:
    """Draw n rows at random, keeping the classes' proportions as `load_task_data` does."""
    columns = columns_of(data)
    return to_dataset(task, _select(columns, _drawn(task, "the validation rows", columns, n, seed)))


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
            with_indices=True, batched=True, batch_size=_STREAMED_AT_ONCE,
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


# --- sources --------------------------------------------------------------------------------------------------------


class _Source:
    """Where the splits of a task are."""

    def __init__(self, task: Task, origin: str) -> None:
        self.task, self.origin = task, origin

    leaves_out_blank = False
    """Whether rows without text are left out: in what somebody made by hand they are mistakes."""

    def read(self, split: str) -> tuple[str, Iterable[Row]]:
        """A split's name in messages, and its rows."""
        raise NotImplementedError

    def stream(self, split: str) -> tuple[str, Iterable[Row]]:
        """The same of rows that are not held."""
        raise UserError(f"{self.origin} cannot be streamed: leave streaming out")


class _Embedded(_Source):
    def read(self, split: str) -> tuple[str, Iterable[Row]]:
        with resources.as_file(resources.files("propulsion") / "demo_data") as folder:
            return split, list(read_rows(folder / f"{split}.jsonl"))


class _Folder(_Source):
    def __init__(self, task: Task, folder: Path) -> None:
        super().__init__(task, str(folder))
        if not folder.is_dir():
            raise UserError(f"data folder {folder} does not exist or is not a folder")
        stems = {"train": ("train",), "validation": tuple(dict.fromkeys(("validation", task.validation_split)))}
        self.paths = {split: _find_file(folder, names) for split, names in stems.items()}

    def read(self, split: str) -> tuple[str, Iterable[Row]]:
        return str(self.paths[split]), read_rows(self.paths[split])

    def stream(self, split: str) -> tuple[str, Iterable[Row]]:
        path = self.paths[split]
        if suffix_of(path).split(".")[1] == "json":
            raise UserError(
                f"{path} cannot be streamed, since JSON may be one array: name it .jsonl, one object a line"
            )
        return str(path), read_rows(path)


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

    leaves_out_blank = True

    def read(self, split: str) -> tuple[str, Iterable[Row]]:
        name, rows = self._load(split)
        return name, self._labelled(rows)

    def stream(self, split: str) -> tuple[str, Iterable[Row]]:
        name, rows = self._load(split, streaming=True)
        return name, self._labelled(rows)

    def _labelled(self, rows: Any) -> Iterator[Row]:
        """Rows that have a label: of SNLI's pairs, some have none that people agreed on."""
        for row in rows_of_batches(rows.iter(batch_size=_STREAMED_AT_ONCE)):
            if self.task.name != "snli" or row.values[LABEL] >= 0:
                yield row


def _source(task: Task, data_dir: Path | str | None, streaming: bool) -> _Source:
    if data_dir is not None and (folder := task_folder(task, Path(data_dir))) is not None:
        return _Folder(task, folder)
    if task.name == EMBEDDED:
        return _Embedded(task, "embedded demo data")
    if task.hub_path is None:
        raise UserError(f"task {task.name} has no home on the Hugging Face hub: give --data-dir with its files")
    return _Hub(task)


def task_folder(task: Task, data_dir: Path) -> Path | None:
    """The folder of a task's files: ``data_dir/TASK`` where there is one, else ``data_dir`` itself.

    Returns:
        The folder; None for the task whose rows are embedded in the package, where `data_dir` is a folder of other
        tasks' folders alone.
    """
    folder = data_dir.expanduser()
    if (own := folder / task.name).is_dir():
        return own
    if task.name == EMBEDDED and folder.is_dir() and not any(path.is_file() for path in folder.iterdir()):
        return None
    return folder


def check_folders(tasks: Sequence[str], data_dir: Path | None) -> None:
    """Make sure that several tasks are not read from one task's files.

    Raises:
        UserError: They would be.
    """
    if data_dir is None:
        return
    folders = [folder for task in tasks if (folder := task_folder(get_task(task), data_dir)) is not None]
    if len(set(folders)) < len(folders):
        names = " and ".join(task for task in tasks if task_folder(get_task(task), data_dir) == data_dir.expanduser())
        raise UserError(f"{names} have no folders of their own in {data_dir}: give the folder that holds {names}")


def _find_file(folder: Path, stems: Sequence[str]) -> Path:
    try:
        paths = sorted(path for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror or error}") from error
    named = [path for path in paths if "." in path.name and path.name.split(".")[0] in stems]
    found = [path for path in named if path.name[path.name.index(".") :].lower() in SUFFIXES]
    found.sort(key=lambda path: SUFFIXES.index(suffix_of(path)))
    if not found:
        there = f"; there is {', '.join(path.name for path in named)}" if named else ""
        suffixes = ", ".join(suffix for suffix in SUFFIXES if suffix.count(".") == 1)
        raise UserError(
            f"no {stems[0]} file in {folder}: looked for {' or '.join(stems)} with {suffixes}, compressed or not{there}"
        )
    if len(found) > 1:
        raise UserError(f"ambiguous {stems[0]} file in {folder}: keep one of {', '.join(path.name for path in found)}")
    return found[0]


def _stream(task: Task, source: _Source, n: int | None) -> IterableDataset:
    def rows() -> Iterator[dict[str, Any]]:
        seen = 0
        name, found = source.stream("train")
        for row in found:
            if n is not None and seen >= n:
                return
            try:
                read = _read_row(task, row)
            except UserError as error:
                if source.leaves_out_blank and isinstance(error, NoText):
                    continue
                raise UserError(f"{name}, {row.place}: {error}") from error
            seen += 1
            yield read
        if not seen:
            raise UserError(f"{name} has no rows")

    source.stream("train")  # What cannot be opened is said now.
    return IterableDataset.from_generator(rows, features=kind_of(task).features(task))


# --- drawing rows ---------------------------------------------------------------------------------------------------


def _label_column(task: Task) -> str | None:
    """The column of single labels, in tasks that have one."""
    return task.label_column if task.kind in ("classification", "regression") else None


def _drawn(task: Task, name: str, columns: Columns, n: int | None, seed: int) -> list[int]:
    """Which rows are used, in file order: a draw decides which rows are used, never their order."""
    total = len(columns[next(iter(columns))])
    if n is None:
        return list(range(total))
    if not 1 <= n <= total:
        raise UserError(
            f"cannot draw {n} rows from {name}: it has {total}; ask for 1 to {total}, or leave it out for all"
        )
    generator = np.random.default_rng(seed)
    if task.kind == "classification":
        chosen = _stratified(np.asarray(columns[task.label_column]), n, generator, name)
    else:
        chosen = generator.choice(total, n, replace=False)
    return sorted(chosen.tolist())


def _select(columns: Columns, chosen: Sequence[int]) -> Columns:
    return {column: [values[place] for place in chosen] for column, values in columns.items()}


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
