"""Holds rows of a single table out for validation: the same rows in every command, whatever its seed."""

import hashlib
import json
from collections.abc import Sequence

from propulsion.data.row_values import label_text
from propulsion.data.tables import Row

SHARE = 0.2
"""Share of the rows that are held out."""


def held_out(
    rows: Sequence[Row], text_columns: Sequence[str], label_column: str, *, by_class: bool
) -> dict[str, list[Row]]:
    """Divide rows into "train" and "validation", a fifth of each class, each part in the order of the table.

    Rows of equal texts stay together, since a row that was trained on says nothing about new ones. Which texts are
    held out depends on the texts alone: they are drawn in the order of their hashes. A class of a single text is
    trained on.

    Args:
        rows: All rows of the table.
        text_columns: The columns of the texts.
        label_column: The column of the label.
        by_class: Whether labels are classes, whose proportions both parts keep.
    """
    texts: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        key = json.dumps([str(row.values.get(column)) for column in text_columns])
        texts.setdefault(hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest(), []).append(index)
    classes: dict[str | None, list[str]] = {}
    for key, members in texts.items():
        label = label_text(rows[members[0]].values.get(label_column)) if by_class else None
        classes.setdefault(label, []).append(key)
    chosen: set[int] = set()
    for keys in classes.values():
        count = max(1, round(SHARE * len(keys))) if len(keys) > 1 else 0
        chosen.update(index for key in sorted(keys)[:count] for index in texts[key])
    return {
        "train": [row for index, row in enumerate(rows) if index not in chosen],
        "validation": [row for index, row in enumerate(rows) if index in chosen],
    }
