"""Reads tables from files (JSON lines, JSON, CSV, TSV and Parquet) as rows of plain Python values.

Types are not guessed: a sentence that happens to be "1999" or "NA" stays text. Text is UTF-8, with or without a byte
order mark, and with any line ends; blank lines are ignored. The text formats may be compressed by gzip, bzip2 or xz.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.lib
import pyarrow.parquet

from propulsion.errors import UserError, first_line

Columns = dict[str, list[Any]]


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        number: Its number, from 1; the header and blank lines are not counted.
        line: The line where it starts, from 1; None in formats without lines.
        values: Its columns by name; empty if the row cannot be read.
        problem: Why the row cannot be read; None if it can.
    """

    number: int
    line: int | None = None
    values: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None

    @property
    def location(self) -> str:
        """The number of the row in words, with its line if that number differs."""
        return f"row {self.number}" + (f" (line {self.line})" if self.line not in (None, self.number) else "")


@dataclass(frozen=True)
class Table:
    """Rows from anywhere.

    Attributes:
        name: The file, or what else the rows are from, for messages.
        read: Reads them from the beginning.
    """

    name: str
    read: Callable[[], Iterable[Row]]


def read_rows(path: Path) -> Iterator[Row]:
    """Read one file, of one of `SUFFIXES`, row by row; a single JSON array is read whole.

    Raises:
        UserError: While the rows are read, if the file cannot be read further. A single bad row has a `problem`.
    """
    try:
        yield from _READERS[suffix_of(path)](path)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeDecodeError, pyarrow.lib.ArrowException) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from error


def suffix_of(path: Path) -> str:
    """The suffix of `SUFFIXES` that a file has, in upper or lower case; "" if it has none."""
    name = path.name.lower()
    return max((suffix for suffix in SUFFIXES if name.endswith(suffix)), key=len, default="")


_OPEN: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def _open(path: Path) -> io.TextIOWrapper:
    # Bytes that are not UTF-8 become lone surrogates, so that the row that holds them can be named.
    opener = _OPEN.get(path.suffix.lower(), open)
    return opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="")


def encoding_problem(text: str) -> str | None:
    """The reason in words why a text cannot be written as UTF-8; None if it can."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        what = f"the byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"half a character, U+{code:04X}"
        return f"not UTF-8 text ({what} at character {error.start + 1}): save it as UTF-8"
    return None


def _read_json(path: Path) -> Iterator[Row]:
    with _open(path) as file:
        number = 0
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            if number == 0 and text.lstrip().startswith("["):
                yield from _read_array(path, line, text + file.read())
                return
            number += 1
            yield _json_row(number, line, text)


def _json_row(number: int, line: int, text: str) -> Row:
    if (problem := encoding_problem(text)) is not None:
        return Row(number, line, problem=problem)
    try:
        return _object_row(number, line, json.loads(text, object_pairs_hook=_object))
    except json.JSONDecodeError as error:
        return Row(number, line, problem=f"not valid JSON at line {line}: {error.msg}; expected one object a line")
    except (ValueError, RecursionError) as error:
        return Row(number, line, problem=f"not valid JSON at line {line}: {first_line(error)}")


def _read_array(path: Path, line: int, text: str) -> Iterator[Row]:
    if (problem := encoding_problem(text)) is not None:
        raise UserError(f"cannot read {path}: {problem}")
    try:
        rows = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON at line {line + error.lineno - 1}: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {first_line(error)}") from error
    for number, row in enumerate(rows, start=1):
        yield _object_row(number, None, row)


def _object_row(number: int, line: int | None, content: Any) -> Row:
    if not isinstance(content, dict):
        return Row(number, line, problem=f"expected an object of columns, found {type(content).__name__}")
    return Row(number, line, content)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"an object names {next(n for n in names if names.count(n) > 1)!r} twice")
    return content


def _read_delimited(path: Path, **dialect: Any) -> Iterator[Row]:
    with _open(path) as file:
        number, header = 0, []
        for line, fields in _fields(path, csv.reader(file, **dialect)):
            if len(fields) < 2 and not "".join(fields).strip():
                continue
            problem = encoding_problem("".join(fields))
            if not header:
                header = [name.strip() for name in fields]
                if problem is not None:
                    raise UserError(f"cannot read {path}: line {line} is {problem}")
                if len(set(header)) != len(header):
                    raise UserError(f"{path} names a column twice: {', '.join(header)}")
                continue
            number += 1
            if len(fields) != len(header):
                problem = f"expected {len(header)} fields, found {len(fields)}: quote fields that hold the separator"
            yield Row(number, line, problem=problem) if problem else Row(number, line, dict(zip(header, fields)))


def _fields(path: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """The line where each row of a csv reader starts, and its fields, which may have any length.

    The limit on the length of a field is a setting of the whole process, and is restored after every row.
    """
    while True:
        line, limit = reader.line_num + 1, csv.field_size_limit(2**31 - 1)
        try:
            fields = next(reader, None)
        except csv.Error as error:
            what = f"{error}: quotation marks inside a quoted field are written twice"
            raise UserError(f"cannot read {path}: the row at line {line}: {what}") from error
        finally:
            csv.field_size_limit(limit)
        if fields is None:
            return
        yield line, fields


def _read_parquet(path: Path) -> Iterator[Row]:
    with pyarrow.parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if len(set(names)) != len(names):
            raise UserError(f"{path} names a column twice: {', '.join(names)}")
        yield from rows_of_batches(batch.to_pydict() for batch in file.iter_batches(batch_size=1024))


def rows_of_batches(batches: Iterable[Columns]) -> Iterator[Row]:
    """The rows of batches, each of which is given by its columns."""
    number = 0
    for columns in batches:
        for values in zip(*columns.values()):
            number += 1
            yield Row(number, values=dict(zip(columns, values)))


_TEXT: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    # With strict=True, a misplaced quotation mark is an error.
    ".csv": partial(_read_delimited, delimiter=",", strict=True),
    # GLUE's .tsv files have no quoting: a quotation mark is part of the sentence.
    ".tsv": partial(_read_delimited, delimiter="\t", quoting=csv.QUOTE_NONE),
}
_PACKED = {f"{suffix}{packed}": reader for suffix, reader in _TEXT.items() for packed in _OPEN}
_READERS = _TEXT | {".parquet": _read_parquet} | _PACKED
SUFFIXES = tuple(_READERS)
"""The suffixes of files that are read."""
