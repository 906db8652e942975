"""Reads the values of rows from users' files: a value with one possible meaning is accepted, any other refused.

Depending on a file's format and its author, a label is `1`, `1.0`, `"1"`, `True` or `"Positive"`, and a single answer
is in a list or not. Messages name the column; the caller adds the file and the row.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from propulsion.data.tables import encoding_problem
from propulsion.errors import UserError, did_you_mean, listed

UNLABELLED = -1  # The label of every row in GLUE's test sets.
_TRUTH = {"true": True, "false": False}
_SHOWN = 60  # Characters of a value in a message.


class NoText(UserError):
    """A text is blank where it may not be."""


def value_of(row: Mapping[str, Any], column: str) -> Any:
    """The value of a row in a column.

    Raises:
        UserError: The row has no such column.
    """
    if column not in row:
        raise UserError(f"lacks the column {column}; its columns are: {listed([*row]) or 'none'}")
    return row[column]


def text(value: Any, column: str, *, blank: bool = False) -> str:
    """Return a value after a check that it is text, and, unless `blank` is set, that it is not blank.

    Raises:
        UserError: It is no text, or cannot be written as UTF-8.
        NoText: It is blank, and `blank` is not set.
    """
    if not isinstance(value, str):
        raise UserError(f"{column} is {shown(value)}, expected text")
    if (problem := encoding_problem(value)) is not None:
        raise UserError(f"{column} is {problem}")
    if not blank and not value.strip():
        raise NoText(f"{column} is {shown(value)}, expected text with something in it")
    return value


def texts(value: Any, column: str, what: str) -> list[str]:
    """Return a value after a check that it is a list of one or more texts, each of which may be blank.

    Raises:
        UserError: It is no such list.
    """
    if not isinstance(value, list) or not value:
        raise UserError(f"{column} is {shown(value)}, expected a list of {what}{_held(value)}")
    return [text(item, f"item {number} of {column}", blank=True) for number, item in enumerate(value, start=1)]


def label_number(value: Any, names: Sequence[str], column: str = "label") -> int:
    """The number of a label, which is given as the number, as the name in any case, or as true or false.

    True and false are accepted only where label 0 is the negation of label 1, as "not_equivalent" of "equivalent".

    Raises:
        UserError: The value is no label.
    """
    if (named := _named(value, names)) is not None:
        return named
    expected = ", ".join(f"{number} ({name})" for number, name in enumerate(names))
    truth = _truth(value)
    if truth is not None:
        if not _affirms(names):
            raise UserError(f"{column} {shown(value)} could be any of {expected}: give the number or the name")
        return int(truth)
    number = _number(value, column, expected)
    if number not in range(len(names)):
        _refuse_unlabelled(number, column)
        raise UserError(f"{column} {shown(value)} is not one of {expected}")
    return int(number)


def label_text(value: Any) -> str | None:
    """A label of a user's row as the name of its class; None if the label is missing.

    >>> [label_text(value) for value in (" sport ", 3, 3.0, 2.5, True, None, "", float("nan"))]
    ['sport', '3', '3', '2.5', 'true', None, None, None]
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        return str(int(value))
    return str(value).strip() or None


def named_label(value: Any, names: Sequence[str], column: str) -> int:
    """The number of a label that is given by the name of its class, as `label_text` writes it.

    Raises:
        UserError: No class has that name.
    """
    name = label_text(value)
    if name is None or name not in names:
        raise UserError(f"{column} {shown(value)} is not one of {listed(names)}{did_you_mean(str(name), names)}")
    return names.index(name)


def score(value: Any, low: float, high: float, column: str = "label") -> float:
    """Return a value as a number after a check that it lies between `low` and `high`, both included.

    Raises:
        UserError: It is no number, or outside the range.
    """
    number = _number(value, column, f"a number from {low} to {high}")
    if not low <= number <= high:
        _refuse_unlabelled(number, column)
        raise UserError(f"{column} {shown(value)} is outside {low} to {high}")
    return number


def whole_number(value: Any, column: str) -> int:
    """Return a value as an integer; it may be written as text or as a float.

    Raises:
        UserError: It is no whole number.
    """
    number = as_number(value)
    if number is None or not math.isfinite(number) or number != int(number):
        raise UserError(f"{column} is {shown(value)}, expected a whole number")
    return int(number)


def parallel_lists(value: Any, keys: tuple[str, ...], column: str) -> dict[str, list[Any]]:
    """Return lists of equal length by their keys; a list of objects, or single items instead of lists, are read too.

    Raises:
        UserError: The value has another form, or lists of different lengths.
    """
    if isinstance(value, list) and all(isinstance(item, dict) and item.keys() >= set(keys) for item in value):
        return {key: [item[key] for item in value] for key in keys}
    if not isinstance(value, dict) or not value.keys() >= set(keys):
        raise UserError(f"{column} is {shown(value)}, expected the lists {' and '.join(keys)}{_held(value)}")
    lists = {key: value[key] if isinstance(value[key], list) else [value[key]] for key in keys}
    if len({len(items) for items in lists.values()}) > 1:
        lengths = ", ".join(f"{len(items)} in {key}" for key, items in lists.items())
        raise UserError(f"the lists of {column} differ in length ({lengths}): expected as many items in each")
    return lists


def as_number(value: Any) -> float | None:
    """A number, or a text that spells one, as a float; None for any other value, such as a bool."""
    if isinstance(value, bool) or (isinstance(value, str) and "_" in value):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def shown(value: Any) -> str:
    """A value as messages show it, cut if it is long."""
    written = repr(value)
    return written if len(written) <= _SHOWN else f"{written[: _SHOWN - 3]}..."


def _named(value: Any, names: Sequence[str]) -> int | None:
    if not isinstance(value, str):
        return None
    if value in names:
        return names.index(value)
    matches = [number for number, name in enumerate(names) if _plain(name) == _plain(value)]
    return matches[0] if len(matches) == 1 else None


def _plain(name: str) -> str:
    return "_".join(name.casefold().replace("-", " ").replace("_", " ").split())


def _affirms(names: Sequence[str]) -> bool:
    if len(names) != 2:
        return False
    no, yes = map(_plain, names)
    return no in (f"not_{yes}", f"un{yes}") or (no, yes) in (("negative", "positive"), ("no", "yes"))


def _truth(value: Any) -> bool | None:
    if isinstance(value, bool):
        return value
    return _TRUTH.get(value.strip().lower()) if isinstance(value, str) else None


def _number(value: Any, column: str, expected: str) -> float:
    number = as_number(value)
    if number is None:
        raise UserError(f"{column} {shown(value)} is not a number: expected {expected}")
    if math.isnan(number):
        raise UserError(f"the {column} is missing (NaN)")
    return number


def _refuse_unlabelled(number: float, column: str) -> None:
    if number == UNLABELLED:
        raise UserError(f"the {column} is -1, which stands for none in GLUE's test sets: use a split with labels")


def _held(value: Any) -> str:
    # All values of CSV and TSV files are text.
    return ", which .jsonl, .json and .parquet files can hold" if isinstance(value, str) else ""
