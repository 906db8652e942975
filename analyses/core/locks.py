"""The lock of a result folder or of a grid's cells, so that one process at a time writes there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import propulsion.lock
from analyses.records.atomic import remove_leftovers
from propulsion.errors import explained


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder in the block, and remove the temporary files that killed processes left in it.

    The lock file is beside the folder, which appears when it is complete.

    Raises:
        UserError: As `propulsion.lock.held`.
    """
    folder = Path(os.path.realpath(folder.expanduser()))  # The same folder has one lock by all of its names.
    with explained(f"lock the folder {folder}"):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with propulsion.lock.held(folder.with_name(f".{folder.name}.lock"), folder):
        remove_leftovers(folder)
        yield
