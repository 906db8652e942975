"""Locks that keep two processes from writing into one folder at the same time."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from propulsion.errors import UserError, explained


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder in the block, so that no other process that asks for it works there.

    The lock is a hidden file beside the folder, `.NAME.lock`, which names the process that holds it. The system
    releases it when that process ends in any way; a file that a killed process left does not count.

    Raises:
        UserError: Another process holds the lock, which the message names; or the file cannot be written.
    """
    folder = Path(os.path.realpath(folder.expanduser()))  # The same folder has one lock by all of its names.
    path = folder.with_name(f".{folder.name}.lock")
    lock = FileLock(path)
    with explained(f"lock the folder {folder}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise UserError(f"{folder} is in use by {_holder(path)}: wait for it, or name another folder") from None
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    try:
        yield
    finally:
        # Removed while it is held: a process that has opened it since then finds that it is no longer there.
        with suppress(OSError):
            path.unlink()
        lock.release()


def _holder(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(encoding="utf-8") or "another process"
    return "another process"
