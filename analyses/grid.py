"""Grids of runs that take hours: one file a cell, so that a killed grid goes on where it was.

A cell's file appears when the cell is complete, by a rename. It holds the settings that all cells share; a folder of
other settings is refused, so that no table mixes two experiments. Arrays stand in a file of their own beside it, which
is there before it.
"""

import json
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from analyses.results import environment, plain
from propulsion.errors import UserError


class Grid:
    """The cells of one experiment, computed once each.

    Attributes:
        computed: Cells computed by this object.
        missing: Names of cells asked for and not computed, since `max_runs` was reached.
    """

    def __init__(self, folder: Path | str, settings: Mapping[str, Any], max_runs: int | None = None) -> None:
        """Open or create the folder of a grid.

        Args:
            folder: Where the cells' files are.
            settings: What all cells have in common and a reader must know.
            max_runs: Compute this many cells and no more; no limit if None.

        Raises:
            UserError: The folder cannot be written.
        """
        self._folder, self._settings, self._max_runs = Path(folder).expanduser(), plain(settings), max_runs
        self.computed = 0
        self.missing: list[str] = []
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write the grid's folder {folder}: {error.strerror or error}") from error

    def cell(self, name: str, compute: Callable[[], Mapping[str, Any]]) -> dict[str, Any] | None:
        """Return what a cell found, from its file or computed now; None if `max_runs` cells were computed before.

        Numbers and texts come back as JSON has them. Arrays, by name under the key "arrays", come back as they were.

        Raises:
            UserError: The cell's file is damaged or of other settings, or cannot be written.
        """
        path = self._folder / f"{re.sub(r'[^A-Za-z0-9_.=+-]+', '-', name)}.json"
        if path.exists():
            return self._read(path)
        if self._max_runs is not None and self.computed >= self._max_runs:
            self.missing.append(name)
            return None
        print(f"{name} ...", flush=True)
        computed = dict(compute())
        arrays = {key: np.asarray(value) for key, value in computed.pop("arrays", {}).items()}
        found = plain(computed)
        self.computed += 1
        content = {"cell": name, "settings": self._settings, "environment": environment(), "found": found}
        if arrays:
            content["arrays"] = sorted(arrays)
        text = json.dumps(content, allow_nan=False) + "\n"
        try:
            if arrays:
                _replace(_beside(path), lambda file: np.savez_compressed(file, allow_pickle=False, **arrays))
            _replace(path, lambda file: file.write(text.encode()))
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
        return found | ({"arrays": arrays} if arrays else {})

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found, stored = content["found"], content["settings"]
            if names := content.get("arrays"):
                with np.load(_beside(path), allow_pickle=False) as file:
                    found["arrays"] = {name: file[name] for name in names}
        except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is damaged ({error}): remove it, and it will be computed again") from error
        if stored != self._settings:
            keys = {*stored, *self._settings}
            differing = sorted(key for key in keys if stored.get(key) != self._settings.get(key))
            raise UserError(
                f"{path.parent} holds runs of other settings ({', '.join(differing)}): name another --runs-dir"
            )
        return found


def _beside(path: Path) -> Path:
    """The file of a cell's arrays."""
    return path.with_suffix(".npz")


def _replace(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as file:
            write(file)
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
