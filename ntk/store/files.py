"""Files of tensors that are complete or not there, and tell whether they are damaged."""

import errno
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ntk.store.identity import tensors_digest

# One entry only, since safetensors writes several in random order, and the same tile shall have the same bytes.
_DIGEST = "sha256"
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Damaged(ValueError):
    """A file is missing, truncated, or holds other bytes than were written."""


def write(path: Path, tensors: Mapping[str, Tensor], of: str = "") -> None:
    """Write tensors beside `path` with their digest, flush them to the disk, and rename the file.

    Args:
        path: the file.
        tensors: its content.
        of: what the tensors were computed from.

    Raises:
        OSError: the file cannot be written; nothing is left behind.
    """
    contiguous = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    partial = beside(path)
    try:
        save_file(contiguous, partial, metadata={_DIGEST: _digest(contiguous, of)})
        publish(partial, path)
    except SafetensorError as error:  # its text holds the system's, of a full disk for instance
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def read(path: Path, of: str = "") -> dict[str, Tensor]:
    """The tensors of a file.

    Raises:
        Damaged: it is missing, truncated, has other bytes than were written, or was computed from something else.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            metadata = file.metadata() or {}
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise Damaged(f"{path} cannot be read: {error}") from error
    if _digest(tensors, of) != metadata.get(_DIGEST):
        raise Damaged(f"{path} has other bytes than were written")
    return tensors


def _digest(tensors: Mapping[str, Tensor], of: str) -> str:
    return hashlib.sha256(f"{tensors_digest(tensors)} {of}".encode()).hexdigest()


def digest_of(path: Path) -> str:
    """The digest that a file says that it has, without reading its tensors."""
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get(_DIGEST, "")


def beside(path: Path) -> Path:
    """A temporary path in the same folder, of this process."""
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


def publish(partial: Path, path: Path) -> None:
    """Flush a file to the disk and rename it, so that after a crash there is the old file or the whole new one."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


@contextmanager
def full_disk(words: str) -> Iterator[None]:
    """Raise an error with these words where the disk is full in the block.

    Raises:
        OSError: the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL or any(os.strerror(code) in str(error) for code in _FULL):
            raise OSError(errno.ENOSPC, f"no space left on the disk: {words}") from error
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text atomically."""
    partial = beside(path)
    try:
        partial.write_text(text, encoding="utf-8")
        publish(partial, path)
    finally:
        partial.unlink(missing_ok=True)
