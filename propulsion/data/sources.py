"""Sources of the rows of a task: a folder of files, the Hugging Face hub, or this package."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import datasets

from propulsion.data.hub import VALIDATION, hub_name, hub_tables
from propulsion.data.splitting import held_out
from propulsion.data.tables import SUFFIXES, Row, Table, read_rows, rows_of_batches, suffix_of
from propulsion.data.tasks import OwnTask, Task, get_task
from propulsion.errors import UserError, explained, first_line, listed
from propulsion.user_files import expanded

LABEL = "label"
EMBEDDED = "demo"
"""The task whose rows come with the package."""
_BATCH = 256  # Rows read from the hub at once.


class Source:
    """A source of a task's rows."""

    leaves_out_blank = False
    """Whether rows without text are left out; otherwise they are reported as mistakes."""

    def __init__(self, task: Task, origin: str) -> None:
        self.task, self.origin = task, origin

    def read(self, split: str) -> tuple[str, Iterable[Row]]:
        """The name of a split for messages, and its rows."""
        raise NotImplementedError

    def stream(self, split: str) -> tuple[str, Iterable[Row]]:
        """The name of a split for messages, and its rows, which are read one by one and not kept in memory."""
        raise UserError(f"{self.origin} cannot be streamed: leave streaming out")


class _Embedded(Source):
    def read(self, split: str) -> tuple[str, Iterable[Row]]:
        with resources.as_file(resources.files("propulsion.data") / "demo") as folder:
            return split, list(read_rows(folder / f"{split}.jsonl"))


class _Files(Source):
    """A file of each split."""

    def __init__(self, task: Task, origin: str, paths: Mapping[str, Path]) -> None:
        super().__init__(task, origin)
        self.paths = paths

    def read(self, split: str) -> tuple[str, Iterable[Row]]:
        return str(self.paths[split]), read_rows(self.paths[split])

    def stream(self, split: str) -> tuple[str, Iterable[Row]]:
        path = self.paths[split]
        if suffix_of(path).split(".")[1] == "json":
            raise UserError(
                f"{path} cannot be streamed, since JSON may be one array: name it .jsonl, one object a line"
            )
        return str(path), read_rows(path)


def _folder(task: Task, folder: Path) -> Source:
    """The files of a task in a folder."""
    with explained(f"read the folder {folder}"):
        if not folder.is_dir():
            raise UserError(f"data folder {folder} does not exist or is not a folder")
    stems = {"train": ("train",), "validation": tuple(dict.fromkeys(("validation", task.validation_split)))}
    return _Files(task, str(folder), {split: _find_file(folder, names) for split, names in stems.items()})


class _Hub(Source):
    leaves_out_blank = True

    def __init__(self, task: Task) -> None:
        self.name = f"{task.hub_path}/{task.hub_config}" if task.hub_config else str(task.hub_path)
        super().__init__(task, f"Hugging Face hub, {self.name}")

    def read(self, split: str) -> tuple[str, Iterable[Row]]:
        return self._rows(split)

    def stream(self, split: str) -> tuple[str, Iterable[Row]]:
        return self._rows(split, streaming=True)

    def _rows(self, split: str, **options: Any) -> tuple[str, Iterator[Row]]:
        task = self.task
        hub_split = split if split == "train" else task.validation_split
        assert task.hub_path is not None
        try:
            rows: Any = datasets.load_dataset(
                task.hub_path, task.hub_config, split=hub_split, revision=task.hub_revision, **options
            )
        except (OSError, ValueError, RuntimeError) as error:  # No network, or no such dataset.
            shown = f"{task.hub_path} ({task.hub_config})" if task.hub_config else task.hub_path
            raise UserError(
                f"cannot get {shown} from the Hugging Face hub: give --data-dir with train and "
                f"validation files, or set up network access ({first_line(error)})"
            ) from error
        # SNLI marks pairs that annotators did not agree on by a negative label.
        labelled = (
            row
            for row in rows_of_batches(rows.iter(batch_size=_BATCH))
            if task.name != "snli" or row.values[LABEL] >= 0
        )
        return f"{self.name} {hub_split}", labelled


_FEWEST = 10
"""Rows of a table without which none are held out."""


class _Table(Source):
    """Rows of one file, of which some are held out for validation (`propulsion.data.splitting`)."""

    def __init__(self, task: OwnTask, table: Table) -> None:
        super().__init__(task, table.name)
        rows = list(table.read())
        parts = held_out(rows, task.text_columns, task.label_column, by_class=not task.is_regression)
        if len(rows) < _FEWEST or not all(parts.values()):
            raise UserError(
                f"{table.name} has {len(rows)} row{'s' * (len(rows) != 1)}, too few to hold some out for validation: "
                "label 20 or more, or give a train and a validation file"
            )
        self._parts = parts

    def read(self, split: str) -> tuple[str, Iterable[Row]]:
        return f"{self.origin} ({split} part)", self._parts[split]


class _Tables(Source):
    """A table of each split of a dataset on the hub."""

    def __init__(self, task: OwnTask, origin: str, tables: Mapping[str, Table]) -> None:
        super().__init__(task, origin)
        self._tables = tables

    def read(self, split: str) -> tuple[str, Iterable[Row]]:
        return self._tables[split].name, self._tables[split].read()


def own_tables(data_dir: Path | str) -> dict[str, Table]:
    """A user's rows, by the split that they are: "train", and "validation" if there are such rows.

    They are those of `own_files`, or of a dataset on the Hugging Face hub (`propulsion.data.hub`).

    Raises:
        UserError: There are no such rows.
    """
    if (name := hub_name(data_dir)) is not None:
        return hub_tables(name)
    return {split: Table(str(path), partial(read_rows, path)) for split, path in own_files(Path(data_dir)).items()}


def own_files(data_dir: Path) -> dict[str, Path]:
    """The files of a user's rows, by the split that they are: "train", and "validation" if there is such a file.

    A folder holds a train file and perhaps a validation file, or one readable file of any name, which is the train
    file. A file is the train file itself.

    Raises:
        UserError: There is no such file.
    """
    place = expanded(data_dir)
    with explained(f"read {place}"):
        if place.is_file():
            if not suffix_of(place):
                raise UserError(f"{place} is of an unknown format: expected {_formats()}")
            return {"train": place}
        if not place.is_dir():
            raise UserError(f"data folder {place} does not exist or is not a folder or file")
        readable = sorted(p for p in place.iterdir() if p.is_file() and suffix_of(p) and not p.name.startswith("."))
    stems = {path.name.split(".")[0].lower() for path in readable}
    if "train" not in stems:
        if len(readable) == 1:
            return {"train": readable[0]}
        there = f"; there is {listed([path.name for path in readable])}" if readable else ""
        raise UserError(f"no train file in {place}: looked for train with {_formats()}, or for one such file{there}")
    found = {"train": _find_file(place, ("train",))}
    if stems & {*VALIDATION}:
        found["validation"] = _find_file(place, VALIDATION)
    return found


def _own_rows(task: OwnTask, data_dir: Path | str | None) -> Source:
    if data_dir is None:
        raise UserError(f"the rows of task {task.name} are yours: give --data-dir, their folder or file")
    tables = own_tables(data_dir)
    if len(tables) == 1:
        return _Table(task, tables["train"])
    if hub_name(data_dir) is not None:
        return _Tables(task, f"Hugging Face hub, {data_dir}", tables)
    return _Files(task, str(data_dir), own_files(Path(data_dir)))


def source_of(task: Task, data_dir: Path | str | None) -> Source:
    """The source of a task's rows: `data_dir` if it is given, else this package or the hub.

    Raises:
        UserError: `data_dir` has no usable files, or it is None and the hub does not have the task.
    """
    if isinstance(task, OwnTask):
        return _own_rows(task, data_dir)
    if data_dir is not None and (folder := task_folder(task, Path(data_dir))) is not None:
        return _folder(task, folder)
    if task.name == EMBEDDED:
        return _Embedded(task, "embedded demo data")
    if task.hub_path is None:
        raise UserError(f"task {task.name} has no home on the Hugging Face hub: give --data-dir with its files")
    return _Hub(task)


def task_folder(task: Task, data_dir: Path) -> Path | None:
    """The folder of a task's files: ``data_dir/TASK`` if it exists, else ``data_dir`` itself.

    Returns:
        The folder; None if the task's rows are embedded in the package and `data_dir` holds folders (of other tasks)
        but no file.
    """
    folder = expanded(data_dir)
    with explained(f"read the folder {folder}"):
        if (own := folder / task.name).is_dir():
            return own
        if task.name == EMBEDDED and folder.is_dir() and not any(path.is_file() for path in folder.iterdir()):
            return None
    return folder


def check_folders(tasks: Sequence[str], data_dir: Path | None) -> None:
    """Check that several tasks have folders of their own.

    Raises:
        UserError: Two tasks would be read from the same folder.
    """
    if data_dir is None:
        return
    folders = [folder for task in dict.fromkeys(tasks) if (folder := task_folder(get_task(task), data_dir)) is not None]
    if len(set(folders)) < len(folders):
        names = " and ".join(task for task in tasks if task_folder(get_task(task), data_dir) == expanded(data_dir))
        raise UserError(f"{names} have no folders of their own in {data_dir}: give the folder that holds {names}")


def _find_file(folder: Path, stems: Sequence[str]) -> Path:
    with explained(f"read the folder {folder}"):
        paths = sorted(path for path in folder.iterdir() if path.is_file())
    named = [path for path in paths if "." in path.name and path.name.split(".")[0].lower() in stems]
    readable = [path for path in named if path.name[path.name.index(".") :].lower() in SUFFIXES]
    readable.sort(key=lambda path: SUFFIXES.index(suffix_of(path)))
    if not readable:
        there = f"; there is {', '.join(path.name for path in named)}" if named else ""
        raise UserError(
            f"no {stems[0]} file in {folder}: looked for {' or '.join(stems)} with {_formats()}, compressed or "
            f"not{there}"
        )
    if len(readable) > 1:
        raise UserError(
            f"ambiguous {stems[0]} file in {folder}: keep one of {', '.join(path.name for path in readable)}"
        )
    return readable[0]


def _formats() -> str:
    return ", ".join(suffix for suffix in SUFFIXES if suffix.count(".") == 1)
