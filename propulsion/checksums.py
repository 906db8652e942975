"""Checksums of a saved model, adapter or checkpoint, in a file within its folder, so that copies are checked too."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from propulsion.errors import UserError, explained
from propulsion.user_files import absolute, expanded

SUMS = "files.sha256"
_REMEDY = f"to use it as it is, remove {SUMS}"
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal. Reads all of it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """Write the SHA-256 of files, by their paths within a folder, into that folder, as the command sha256sum does."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
    (folder / SUMS).write_text(lines, encoding="utf-8")


def check_sums(saved: Path | str) -> None:
    """Check the files of a saved model or adapter against the checksums in its folder, if it has any.

    Reads every listed file in full. Files that are missing or not listed do no harm here: what is needed is missed when
    it is read.

    Raises:
        UserError: A file has another content than the one that was written.
    """
    with explained(f"read the folder {saved}"):
        if not (expanded(saved) / SUMS).is_file():
            return
        folder = absolute(saved)
        lines = (folder / SUMS).read_bytes().decode("utf-8", errors="replace").split("\n")
        entries = [_LINE.fullmatch(line) for line in lines[:-1]]
        if lines[-1] or not all(entries):
            raise UserError(f"{saved} is damaged ({folder.name}/{SUMS} has a line that is no checksum); {_REMEDY}")
        for digest, name in (entry.groups() for entry in entries if entry is not None):
            if (folder / name).is_file() and sha256_of(folder / name) != digest:
                raise UserError(
                    f"{saved} is damaged ({folder.name}/{name} is not as it was written, by {SUMS}); {_REMEDY}"
                )
