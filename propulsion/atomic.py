"""Files and folders that appear whole or not at all: written beside their place, flushed to the disk, then renamed."""

import json
import os
from pathlib import Path
from typing import Any


def beside(path: Path) -> Path:
    """Where a file or a folder is written before it gets its name."""
    return path.with_name(f".{path.name}.partial")


def publish(written: Path, path: Path) -> None:
    """Flush a file, or every file below a folder, to the disk, and then rename it; a file at `path` is replaced."""
    for file in written.rglob("*") if written.is_dir() else (written,):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
    (os.rename if written.is_dir() else os.replace)(written, path)


def write_json(path: Path, content: Any) -> None:
    """Write a file of JSON, whole or not at all."""
    partial = beside(path)
    partial.write_text(json_text(content), encoding="utf-8")
    publish(partial, path)


def json_text(content: Any) -> str:
    """What `write_json` writes."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
