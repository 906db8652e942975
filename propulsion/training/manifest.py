"""A list, with hashes, of the files that a program wrote into a folder, so that the program removes no other files.

The list is a file in the folder. A file counts as the program's own while it has the listed content; a file that
somebody else has added, changed or replaced by a link does not, whatever its name. The list holds a checksum of itself.
"""

import hashlib
import json
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from propulsion.atomic import beside, json_text, publish, write_json
from propulsion.checksums import SUMS, sha256_of, write_sums
from propulsion.training.lock import LOCK

MANIFEST = "files.json"
_FORMAT = 1
_CHECKSUM = "sha256"
"""Key of the list's own checksum, which lists of earlier versions do not have."""
_KEYS = {"bytes", "modified", "sha256"}


class Manifest:
    """The files that a program wrote into one folder. Every method reads the list again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def exists(self) -> bool:
        """Whether the folder has such a list."""
        return self._read() is not None

    def others(self) -> list[str]:
        """Names of everything in the folder except the list itself and the lock, sorted."""
        if not self.folder.is_dir():
            return []
        kept = (MANIFEST, beside(self.folder / MANIFEST).name, LOCK)
        return sorted(path.name for path in self.folder.iterdir() if path.name not in kept)

    def start(self) -> None:
        """Make the folder, with an empty list."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write({})

    def record(self, files: Mapping[str, Path]) -> None:
        """Add files to the list.

        Call it before they get their final names: a process killed in between then leaves an entry without a file,
        and never a file without an entry.

        Args:
            files: Where each file is now, by its path within the folder.
        """
        self._write((self._read() or {}) | {name: _entry(path) for name, path in files.items()})

    def write_json(self, path: Path, content: Any) -> None:
        """List and write a JSON file; the caller has made sure that no foreign file is replaced.

        Where it replaces a file, the entry also has the checksum of that one, so that the file counts as the program's
        own if the process is killed before it is replaced.
        """
        data, files, name = json_text(content).encode(), self._read() or {}, self._name(path)
        entry = {"bytes": len(data), "modified": None, "sha256": hashlib.sha256(data).hexdigest()}
        if path.exists():
            entry["replaces"] = sha256_of(path)
        self._write(files | {name: entry})
        write_json(path, content)

    def publish(self, written: Path, destination: Path) -> None:
        """List the files below a complete folder, and rename the folder to `destination`, which must not exist.

        Their checksums are also written into the folder (`propulsion.checksums`).
        """
        within, files = f"{self._name(destination)}/", [path for path in written.rglob("*") if path.is_file()]
        entries = {path.relative_to(written).as_posix(): _entry(path) for path in files}
        write_sums(written, {name: entry["sha256"] for name, entry in entries.items()})
        entries[SUMS] = _entry(written / SUMS)
        # Entries of an earlier folder of this name, which is gone, would count as missing files of the new one.
        others = {name: entry for name, entry in (self._read() or {}).items() if not name.startswith(within)}
        self._write(others | {f"{within}{name}": entry for name, entry in entries.items()})
        publish(written, destination)

    def damaged(self, path: Path) -> str | None:
        """What is wrong with a file, or with a file below a folder, in words; None if all have their listed content.

        Added files do no harm. Reads every file in full, since a flipped bit changes neither size nor time.
        """
        name = self._name(path)
        known = {n: entry for n, entry in (self._read() or {}).items() if n == name or n.startswith(f"{name}/")}
        if not known:
            return f"{name} is not in {MANIFEST}"
        for file, entry in known.items():
            written = self.folder.joinpath(*PurePosixPath(file).parts)
            if not written.is_file():
                return f"{file} is missing"
            if sha256_of(written) not in _digests(entry):
                return f"{file} is not as it was written, by {MANIFEST}"
        return None

    def not_own(self, path: Path) -> list[Path]:
        """Files, links and empty folders at or below a path that are not the program's own."""
        known = self._read() or {}
        return [file for file in _below(path) if not _is(file, known.get(self._name(file)))]

    def own(self) -> list[Path]:
        """The listed files that exist with their listed content."""
        paths = (
            (self.folder.joinpath(*PurePosixPath(name).parts), entry) for name, entry in (self._read() or {}).items()
        )
        return [path for path, entry in paths if not _linked(self.folder, path) and _is(path, entry)]

    def remove(self, path: Path) -> None:
        """Remove one of the program's own files, and the folders that this leaves empty.

        Raises:
            OSError: It cannot be removed.
        """
        path.unlink()
        for parent in path.parents:
            if parent == self.folder or any(parent.iterdir()):
                break
            parent.rmdir()

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _write(self, files: Mapping[str, Any]) -> None:
        content = {"format": _FORMAT, "written by": "propulsion.train", "files": dict(files)}
        write_json(self.folder / MANIFEST, content | {_CHECKSUM: _sum_of(content)})

    def _read(self) -> dict[str, dict[str, Any]] | None:
        try:
            content = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
            checksum, files = content.pop(_CHECKSUM, None), content["files"]
            if content.keys() != {"format", "written by", "files"} or checksum not in (None, _sum_of(content)):
                return None
            if content["format"] != _FORMAT or content["written by"] != "propulsion.train":
                return None
            good = all(_is_inside(name) and entry.keys() - {"replaces"} == _KEYS for name, entry in files.items())
        except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
            return None
        return files if good else None


def _sum_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json_text(content).encode()).hexdigest()


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and bool(path.parts)


def _below(path: Path) -> Iterator[Path]:
    """Files, links and empty folders at or below a path; links are not followed."""
    if not path.is_symlink() and path.is_dir():
        inside = list(path.iterdir())
        if inside:
            for entry in inside:
                yield from _below(entry)
            return
    if path.is_symlink() or path.exists():
        yield path


def _linked(folder: Path, path: Path) -> bool:
    """Whether one of the folders between `folder` and the path is a link."""
    folders = path.relative_to(folder).parts
    return any(folder.joinpath(*folders[:i]).is_symlink() for i in range(1, len(folders)))


def _entry(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {"bytes": status.st_size, "modified": status.st_mtime_ns, "sha256": sha256_of(path)}


def _digests(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """SHA-256 of the content that a file may have: the listed one, and the one that it may not have replaced yet."""
    return (entry["sha256"], *((entry["replaces"],) if "replaces" in entry else ()))


def _is(path: Path, entry: Mapping[str, Any] | None) -> bool:
    try:
        status = path.lstat()
        if entry is None or not stat.S_ISREG(status.st_mode):
            return False
        if status.st_size != entry["bytes"] and "replaces" not in entry:
            return False
        # Checkpoints are large: a file whose time of modification has not changed is not read again.
        return status.st_mtime_ns == entry["modified"] or sha256_of(path) in _digests(entry)
    except OSError:
        return False
