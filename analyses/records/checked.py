"""Reads files whose content may be damaged: by their checksum where one is known, and JSON in its strict form alone."""

import hashlib
import json
from pathlib import Path
from typing import Any

from analyses.records.errors import RecordError


def sha256(content: bytes) -> str:
    """SHA-256 of some bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def read_checked(path: Path, expected: str | None, where: str = "stored with it") -> bytes:
    """The bytes of a file, whose SHA-256 must be `expected` unless that is None; messages say `where` that is stored.

    Raises:
        RecordError: The file cannot be read, or has another SHA-256.
    """
    try:
        content = path.read_bytes()
    except (OSError, MemoryError) as error:
        raise RecordError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if expected is not None and sha256(content) != expected:
        raise RecordError(f"{path} is damaged or was changed by hand: its SHA-256 is not the one {where}")
    return content


def strict_json(text: str | bytes) -> Any:
    """Parse JSON; unlike `json.loads`, refuse NaN, infinities, and objects that give a name twice.

    Raises:
        ValueError: It is no such JSON, or nested too deeply to be read.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse_constant(literal: str) -> Any:
    raise ValueError(f"{literal} is no JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("an object gives a name twice")
    return content
