"""A lock on the folder of a run, so that two processes never train in one folder."""

import contextlib
import errno
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from propulsion.errors import UserError, explained

LOCK, HOLDER = ".lock", ".lock-holder.json"
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder during the block. The folder is made, and removed again if it stays empty.

    The system releases the lock when the process ends, even if it is killed. A folder that cannot be written is not
    locked: a finished run in it can still be read.

    Raises:
        UserError: Another process holds the lock; the message says which one. Or the folder cannot be made.
    """
    lock = FileLock(folder / LOCK, timeout=0)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with explained(f"use the folder {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            (folder / HOLDER).write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
    except Timeout as error:
        raise UserError(
            f"{folder} is in use by {_holder(folder)}: wait until that process ends, or name another --output-dir"
        ) from error
    except UserError as error:
        lock.release()
        if getattr(error.__cause__, "errno", None) not in _READ_ONLY:
            raise
    try:
        yield
    finally:
        if lock.is_locked:
            # They are removed while the lock is held, so that no process takes the lock of a file that is gone.
            (folder / HOLDER).unlink(missing_ok=True)
            (folder / LOCK).unlink(missing_ok=True)
            lock.release()
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()


def _holder(folder: Path) -> str:
    try:
        holder = json.loads((folder / HOLDER).read_text())
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, LookupError, TypeError):
        return "another process"
