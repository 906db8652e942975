"""A lock on the folder of a run, so that two processes never train in one folder."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from propulsion.errors import UserError, explained
from propulsion.lock import held

LOCK = ".lock"
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder during the block. The folder is made, and removed again if it stays empty.

    A folder that cannot be written is not locked: a finished run in it can still be read.

    Raises:
        UserError: Another process holds the lock; the message says which one. Or the folder cannot be made.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with contextlib.ExitStack() as stack:
            try:
                with explained(f"use the folder {folder}"):
                    folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(held(folder / LOCK, folder))
            except UserError as error:
                if getattr(error.__cause__, "errno", None) not in _READ_ONLY:
                    raise
            yield
    finally:
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()
