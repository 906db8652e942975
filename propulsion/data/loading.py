"""Loads the examples of a task from files, the Hugging Face hub or this package, checks them, and draws some."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from propulsion.data.kinds import kind_of, to_dataset
from propulsion.data.kinds.classification import check_variety
from propulsion.data.row_values import NoText
from propulsion.data.sampling import draw, select
from propulsion.data.sources import Source, source_of
from propulsion.data.tables import Columns, Row
from propulsion.data.tasks import OwnTask, Task, get_task
from propulsion.errors import UserError, listed, together
from propulsion.identity import content_identity

SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Origin:
    """The source of some rows, which messages name.

    Attributes:
        rows: The rows.
        name: The file, or the split of a dataset on the hub.
        locations: For each row, its place in the file or split, in words.
    """

    rows: Dataset
    name: str
    locations: Sequence[str]

    def part(self, rows: Dataset, chosen: Sequence[int]) -> "Origin":
        """The source of rows that were made from those of these indices."""
        return Origin(rows, self.name, [self.locations[row] for row in chosen])


@dataclass(frozen=True)
class TaskData:
    """The examples of one run.

    Attributes:
        task: The task.
        train: Training rows in the task's columns (of an instruction: prompt, answer, choices); none if streamed.
        validation: Held-out rows, in the same columns.
        source: Where the rows come from and how they were subsampled, in words.
        fingerprint: SHA-256 of the rows, which differs between runs on different rows; in place of streamed training
            rows, it covers the name of their source.
        stream: Training rows that are read as they are needed; None unless streaming was asked for.
        origins: The sources of the loaded rows.
        all_rows: SHA-256 of all rows of the loaded splits, before some were drawn; None of rows of another origin.
    """

    task: Task
    train: Dataset
    validation: Dataset
    source: str
    fingerprint: str
    stream: IterableDataset | None = None
    origins: tuple[Origin, ...] = ()
    all_rows: str | None = None


def load_task_data(
    task: str | Task,
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
        task: Name of the task, or the task, such as one that `task_from_columns` has made.
        data_dir: Folder with one `train` and one `validation` file in the column names of the hub: .jsonl, .json, .csv
            or .tsv, as they are or compressed (.gz, .bz2, .xz), or .parquet; or a folder with such a folder in it,
            named after the task. Labels are numbers, or the task's label names in any case. Other columns are not read.
            For a task of one's own, a folder or a file as `propulsion.data.sources.own_files` describes, or the name of
            a dataset on the hub.
        n_train: Rows to draw at random for training; all if None. Of streamed rows, the first ones are taken.
        n_validation: Rows to draw at random for validation; all if None.
        seed: Seed of the draws. Draws are stratified: classes keep their proportions, each with one row at least.
        streaming: Read and check training rows as they are needed, and keep none in memory.

    Raises:
        UserError: If the task is unknown, the data cannot be found or read, or rows cannot be used; all such rows of
            both splits are counted, and the first of them named.
    """
    entry = task if isinstance(task, Task) else get_task(task)
    if streaming and n_train is not None and n_train < 1:
        raise UserError(f"cannot take {n_train} rows of a stream: ask for 1 or more, or leave it out for all")
    source = source_of(entry, data_dir)
    sizes = {split: n for split, n in zip(SPLITS, (n_train, n_validation)) if not (streaming and split == "train")}
    splits = together(*(partial(_read_split, entry, source, split, n, seed) for split, n in sizes.items()))
    rows = {split: columns for split, (columns, *_) in zip(sizes, splits)}
    notes = [note for *_, note, _ in splits]
    if streaming:
        notes.insert(0, f"train rows streamed{'' if n_train is None else f', the first {n_train}'}")
        rows["train"] = {name: [] for name in kind_of(entry).features(entry)}
    sets = {split: to_dataset(entry, columns) for split, columns in rows.items()}
    return TaskData(
        task=entry, train=sets["train"], validation=sets["validation"], source=f"{source.origin}; {', '.join(notes)}",
        fingerprint=content_identity(rows | ({"streamed": source.origin} if streaming else {})),
        stream=_stream(entry, source, n_train) if streaming else None,
        origins=tuple(Origin(sets[split], name, locations) for split, (_, name, locations, *_) in zip(sizes, splits)),
        all_rows=content_identity([digest for *_, digest in splits]),
    )  # fmt: skip


def _read_split(
    task: Task, source: Source, split: str, n: int | None, seed: int
) -> tuple[Columns, str, list[str], str, str]:
    """The drawn rows of a split, its name, the location of each row, how they were drawn, and a hash of all rows."""
    name, rows = source.read(split)
    columns, locations, left_out = _checked(task, name, rows, leave_out=source.leaves_out_blank)
    if task.kind in ("classification", "regression"):
        labels = columns[task.label_column]
        # Users know the labels of their rows by name.
        check_variety(name, [task.label_names[n] for n in labels] if isinstance(task, OwnTask) and task.label_names
                      else labels)  # fmt: skip
    chosen = draw(task, name, columns, n, seed)
    note = f"{len(chosen)} of {len(locations)} {split} rows"
    note += "" if len(chosen) == len(locations) else f" drawn with seed {seed}"
    note += f" ({left_out} without text left out)" if left_out else ""
    return select(columns, chosen), name, [locations[row] for row in chosen], note, content_identity(columns)


def _checked(task: Task, name: str, rows: Iterable[Row], *, leave_out: bool) -> tuple[Columns, list[str], int]:
    """The rows as columns of the task, the location of each row, and the number of rows left out for lack of text.

    Raises:
        UserError: Rows cannot be used, or there are none. All rows are read; the message counts the unusable ones and
            names the first few.
    """
    columns: Columns = {column: [] for column in kind_of(task).features(task)}
    locations, problems, seen, left_out, unread = [], [], {}, 0, 0
    for row in rows:
        seen |= dict.fromkeys(row.values)
        unread += row.problem is not None
        try:
            read = _read_row(task, row)
        except UserError as error:
            if leave_out and isinstance(error, NoText):
                left_out += 1
            else:
                problems.append(f"{row.location}: {error}")
        else:
            locations.append(row.location)
            for column, values in columns.items():
                values.append(read[column])
    total = len(locations) + len(problems)
    if not total:
        raise UserError(f"{name} has no rows")
    if not unread and (missing := [column for column in (*task.text_columns, task.label_column) if column not in seen]):
        raise UserError(
            f"{name} lacks the column {', '.join(missing)} of task {task.name}; its columns are: {listed([*seen])}"
        )
    if len(problems) == 1:
        raise UserError(f"{name}, {problems[0]}")
    if problems:
        raise UserError(f"{name}: {len(problems)} of {total} rows cannot be used: {listed(problems, '; ')}")
    return columns, locations, left_out


def _read_row(task: Task, row: Row) -> dict[str, Any]:
    if row.problem is not None:
        raise UserError(row.problem)
    return kind_of(task).read(task, row.values)


def _stream(task: Task, source: Source, n: int | None) -> IterableDataset:
    def rows() -> Iterator[dict[str, Any]]:
        seen = 0
        name, stream = source.stream("train")
        for row in stream:
            if n is not None and seen >= n:
                return
            try:
                read = _read_row(task, row)
            except UserError as error:
                if source.leaves_out_blank and isinstance(error, NoText):
                    continue
                raise UserError(f"{name}, {row.location}: {error}") from error
            seen += 1
            yield read
        if not seen:
            raise UserError(f"{name} has no rows")

    source.stream("train")  # Raises now if the rows cannot be opened.
    return IterableDataset.from_generator(rows, features=kind_of(task).features(task))
