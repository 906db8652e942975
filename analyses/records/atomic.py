"""Files that appear whole or not at all."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from analyses.records.errors import RecordError


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` when the block is done; what was at `path` stays until then.

    The bytes are on the disk before the name is, so that a machine that stops leaves the old file or the new one.

    Raises:
        OSError: The file cannot be written; nothing is left of it.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    """Write text files into a folder, which is created if missing, each whole or not at all.

    Raises:
        RecordError: The folder or a file cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            with whole(folder / name) as partial:
                partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RecordError(f"cannot write to {folder}: {error.strerror or error}") from error
