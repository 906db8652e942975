"""Grids of runs that take hours: one file a cell, so that a killed grid goes on where it was.

A cell's file appears when the cell is complete, by a rename. It holds the settings that all cells share; a folder of
other settings is refused, so that no table mixes two experiments. Arrays lie in a second file beside it, which is
there before it.
"""

import contextlib
import json
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from analyses.results import environment, plain
from propulsion.errors import UserError

ARRAYS = "arrays"
"""What a cell found under this name, arrays by their names, is kept as arrays, and not as text."""


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
        arrays = computed.pop(ARRAYS, None)
        found = plain(computed)
        self.computed += 1
        try:
            content = {"cell": name, "settings": self._settings, "environment": environment(), "found": found}
            if arrays is not None:
                content |= {ARRAYS: {key: list(value.shape) for key, value in arrays.items()}}
                with _whole(_beside(path)) as partial, partial.open("wb") as file:
                    np.savez_compressed(file, allow_pickle=False, **arrays)
            with _whole(path) as partial:
                partial.write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
        return found if arrays is None else found | {ARRAYS: dict(arrays)}

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found, stored = content["found"], content["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}): remove it, and it will be computed again") from error
        if stored != self._settings:
            keys = {*stored, *self._settings}
            differing = sorted(key for key in keys if stored.get(key) != self._settings.get(key))
            raise UserError(
                f"{path.parent} holds runs of other settings ({', '.join(differing)}): name another --runs-dir"
            )
        return found if ARRAYS not in content else found | {ARRAYS: _read_arrays(path, content[ARRAYS])}


def _beside(path: Path) -> Path:
    return path.with_suffix(".npz")


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` when the block is done."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    yield partial
    os.replace(partial, path)


def _read_arrays(path: Path, shapes: Mapping[str, list[int]]) -> dict[str, np.ndarray]:
    try:
        with np.load(_beside(path), allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in shapes}
        if wrong := [name for name, shape in shapes.items() if list(arrays[name].shape) != shape]:
            raise ValueError(f"{wrong[0]} has another shape")
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{_beside(path)} is damaged ({error}): remove it and {path.name}, and they will be computed again"
        ) from error
    return arrays
