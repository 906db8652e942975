"""A lock file, which keeps two processes from working in one folder at the same time."""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from propulsion.errors import UserError, explained


@contextlib.contextmanager
def held(path: Path, folder: Path) -> Iterator[None]:
    """Hold a lock file in the block, so that no other process that asks for it works in the folder.

    The file names the process that holds it. The system releases the lock when that process ends in any way; a file
    that a killed process left does not count.

    Args:
        path: The lock file, which is made and removed; its folder exists.
        folder: The folder that it stands for, which messages name.

    Raises:
        UserError: Another process holds the lock, which the message names; or the file cannot be written.
    """
    lock = FileLock(path)
    with explained(f"lock the folder {folder}"):
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise UserError(f"{folder} is in use by {_holder(path)}: wait for it, or name another folder") from None
        try:
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        except OSError:
            lock.release()
            raise
    try:
        yield
    finally:
        # Removed while it is held: a process that has opened it since then finds that it is no longer there.
        with contextlib.suppress(OSError):
            path.unlink()
        lock.release()


def _holder(path: Path) -> str:
    """The process that a lock file names; a process that has just locked it writes its name a moment later."""
    for _ in range(20):
        with contextlib.suppress(OSError, ValueError):
            if name := path.read_text(encoding="utf-8"):
                return name
        time.sleep(0.05)
    return "another process"
