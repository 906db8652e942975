"""Atomic writing: files and folders are written under a temporary name, flushed to the disk, then renamed."""

import json
import math
import os
from pathlib import Path
from typing import Any


def beside(path: Path) -> Path:
    """The temporary path, in the same folder, under which a file or folder is written before it is renamed."""
    return path.with_name(f".{path.name}.partial")


def publish(written: Path, path: Path) -> None:
    """Flush a file, or all files in a folder, to the disk and rename it to `path`; a file at `path` is replaced."""
    for file in written.rglob("*") if written.is_dir() else (written,):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
    (os.rename if written.is_dir() else os.replace)(written, path)


def write_json(path: Path, content: Any) -> None:
    """Write content as a JSON file that replaces `path` only when it is complete."""
    write_text(path, json_text(content))


def write_text(path: Path, text: str) -> None:
    """Write a text file that replaces `path` only when it is complete; nothing is left of one that is not."""
    partial = beside(path)
    try:
        partial.write_text(text, encoding="utf-8")
        publish(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)  # It takes space on a disk that may be full.
        raise


def json_text(content: Any) -> str:
    """The text of the file that `write_json` writes: strict JSON, in which a number that is not finite is null."""
    return json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
