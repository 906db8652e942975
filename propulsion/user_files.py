"""Paths and JSON files that come from the user: read with a check of their form, so that mistakes are one line."""

import json
import os
from pathlib import Path
from typing import Any

from propulsion.errors import UserError, explained, first_line


def expanded(path: Path | str) -> Path:
    """The path with "~" and "~user" replaced by the home folder; unchanged if there is no such user."""
    return Path(os.path.expanduser(path))


def absolute(path: Path | str) -> Path:
    """The absolute path, expanded, with links replaced; a link that leads to itself stays."""
    return Path(os.path.realpath(expanded(path)))


def read_json(path: Path, kind: type = dict, *, needed: str = "") -> Any:
    """The content of a JSON file.

    Args:
        path: The file.
        kind: The type that its content must have.
        needed: A key that the object must have.

    Raises:
        UserError: The file cannot be read, is not JSON, has another type, or lacks the key.
    """
    try:
        with explained(f"read {path}"):
            content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged: {first_line(error)}") from error
    if not isinstance(content, kind):
        names = {dict: "an object", list: "a list"}
        raise UserError(f"{path} is damaged: expected {names[kind]} of JSON, got {type(content).__name__}")
    if needed and needed not in content:
        raise UserError(f"{path} is damaged: it has no {needed}")
    return content
