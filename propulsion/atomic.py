"""Files that are written whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """Write a file of JSON, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json_text(content), encoding="utf-8")
    os.replace(partial, path)


def json_text(content: Any) -> str:
    """What `write_json` writes."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def flush(path: Path) -> None:
    """Have the content of a file on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
