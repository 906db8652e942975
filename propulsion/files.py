"""Tables in files: JSON lines, CSV, TSV and Parquet, as columns of plain Python values.

Values are read as they stand, with no guessing of types: a sentence that happens to be "1999" or "NA" stays text.
"""

import csv
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.lib
import pyarrow.parquet

from propulsion.errors import UserError, first_line

Columns = dict[str, list[Any]]


def read_table(path: Path) -> Columns:
    """Read one file by the reader of its suffix, one of `SUFFIXES`.

    Raises:
        UserError: If the file cannot be read, naming the line where there is one.
    """
    try:
        return READERS[path.suffix.lower()](path)
    except (OSError, UnicodeDecodeError, csv.Error, pyarrow.lib.ArrowException) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from error


def write_json(path: Path, content: Any) -> None:
    """Write a file of JSON, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def stream_table(path: Path, size: int) -> Iterator[Columns]:
    """Read one file in batches of rows, holding no more than one: JSON lines and Parquet.

    Raises:
        UserError: The format has to be read whole, or, while reading, the file cannot be read.
    """
    if path.suffix.lower() not in _STREAMERS:
        raise UserError(f"{path} cannot be streamed, only {' and '.join(_STREAMERS)} can: leave streaming out")
    return _streamed(path, size)


def _streamed(path: Path, size: int) -> Iterator[Columns]:
    try:
        yield from _STREAMERS[path.suffix.lower()](path, size)
    except (OSError, UnicodeDecodeError, pyarrow.lib.ArrowException) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from error


def _stream_jsonl(path: Path, size: int) -> Iterator[Columns]:
    with path.open(encoding="utf-8-sig") as file:
        lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
        while chunk := list(itertools.islice(lines, size)):
            yield _columns(path, ((number, _parse(path, line, number)) for number, line in chunk))


def _stream_parquet(path: Path, size: int) -> Iterator[Columns]:
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=size):
        yield batch.to_pydict()


_STREAMERS: dict[str, Callable[[Path, int], Iterator[Columns]]] = {
    ".jsonl": _stream_jsonl,
    ".parquet": _stream_parquet,
}


def _read_json(path: Path) -> Columns:
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        return _columns(path, enumerate(_parse(path, text, 1), start=1))
    # Split at newlines only: str.splitlines would also cut at separators that JSON allows inside a string.
    lines = enumerate(text.split("\n"), start=1)
    return _columns(path, ((number, _parse(path, line, number)) for number, line in lines if line.strip()))


def _parse(path: Path, text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON at line {line + error.lineno - 1}: {error.msg}") from error


def _columns(path: Path, rows: Iterable[tuple[int, Any]]) -> Columns:
    columns: Columns = {}
    for index, (number, row) in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{path}, row {number}: expected an object of columns, found {type(row).__name__}")
        if index == 0:
            columns = {name: [] for name in row}
        if row.keys() != columns.keys():
            raise UserError(f"{path}, row {number}: columns {', '.join(row)} differ from {', '.join(columns)}")
        for name, values in columns.items():
            values.append(row[name])
    return columns


def _read_csv(path: Path) -> Columns:
    return _read_delimited(path, delimiter=",")


def _read_tsv(path: Path) -> Columns:
    # GLUE's own .tsv files do not quote: a quotation mark is a character of the sentence.
    return _read_delimited(path, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_delimited(path: Path, **dialect: Any) -> Columns:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, **dialect)
        header = next(reader, [])
        columns: Columns = {name: [] for name in header}
        if len(columns) != len(header):
            raise UserError(f"{path} names a column twice: {', '.join(header)}")
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise UserError(f"{path}, line {reader.line_num}: expected {len(header)} fields, found {len(row)}")
            for values, value in zip(columns.values(), row):
                values.append(value)
    return columns


def _read_parquet(path: Path) -> Columns:
    return pyarrow.parquet.read_table(path).to_pydict()


READERS: dict[str, Callable[[Path], Columns]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
SUFFIXES = tuple(READERS)
