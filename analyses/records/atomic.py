"""Atomic writes: a file appears complete under its name, or not at all."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from analyses.records.errors import RecordError


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; after the block, the file written there is renamed to `path`.

    An earlier file at `path` stays until then. The new file is flushed to the disk before it is renamed, so that after
    a crash of the machine there is either the old file or the new one.

    Raises:
        OSError: The file cannot be written; the temporary file is removed.
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


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of `whole` that killed processes left in a folder where no other process writes.

    Only regular files with the name that `whole` gives, which ends in the number of a process, are removed.
    """
    for partial in folder.glob(".*.partial-*"):
        if partial.name.rpartition("-")[2].isdigit() and partial.is_file() and not partial.is_symlink():
            with contextlib.suppress(OSError):
                partial.unlink()


def write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    """Write text files, given by their names, into a folder, which is created if missing. Each write is atomic.

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
