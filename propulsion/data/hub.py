"""Rows of a dataset on the Hugging Face hub that a user names in place of a folder.

Its name is ``OWNER/NAME``, or ``OWNER/NAME:CONFIG``. Only such names, without the suffix of a file of rows, are taken
for the hub's, and only where there is no folder or file of that name. The split "train" is read, and "validation" if
there is one; a split "test" is not read. Numbers of classes become the names that the dataset gives them; a number
below zero is no label.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets

from propulsion.data.tables import Row, Table, rows_of_batches, suffix_of
from propulsion.errors import UserError, first_line, listed
from propulsion.user_files import expanded

VALIDATION = ("validation", "valid", "val", "dev")
"""Names of held-out rows."""
_NAME = re.compile(r"(?P<path>\w[\w.-]*/\w[\w.-]*)(?::(?P<config>[\w.-]+))?")
_BATCH = 256  # Rows read at once.


def hub_name(data_dir: Path | str) -> str | None:
    """The name of a dataset on the hub that stands in place of a folder; None if it is none, or a folder or file."""
    name = str(data_dir)
    is_name = _NAME.fullmatch(name) and not suffix_of(Path(name))
    return name if is_name and not expanded(Path(name)).exists() else None


def hub_tables(name: str) -> dict[str, Table]:
    """The rows of a dataset on the hub: "train", and "validation" if there is such a split.

    Raises:
        UserError: There is no such dataset, folder or file, the hub cannot be reached, or there is no split "train".
    """
    parts = _NAME.fullmatch(name)
    assert parts is not None
    try:
        splits: Any = datasets.load_dataset(parts["path"], parts["config"])
    except (OSError, ValueError, RuntimeError) as error:  # No network, no such dataset, or several configurations.
        raise UserError(
            f"there is no folder or file {name}, and it cannot be got from the Hugging Face hub: {first_line(error)}"
        ) from error
    if "train" not in splits:
        raise UserError(f"dataset {name} on the Hugging Face hub has no split train; it has {listed([*splits])}")
    held_out = next((split for split in VALIDATION if split in splits), None)
    chosen = {"train": "train"} | ({} if held_out is None else {"validation": held_out})
    return {split: _table(f"{name} {own}", splits[own]) for split, own in chosen.items()}


def _table(name: str, rows: Any) -> Table:
    classes = {column: f.names for column, f in rows.features.items() if isinstance(f, datasets.ClassLabel)}

    def read() -> Iterator[Row]:
        for row in rows_of_batches(rows.iter(batch_size=_BATCH)):
            named = {column: _class(row.values[column], names) for column, names in classes.items()}
            yield replace(row, values=row.values | named)

    return Table(name, read)


def _class(value: Any, names: list[str]) -> str | None:
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None
