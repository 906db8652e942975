"""Grids of training runs that take hours: each finished run is a file, so that a killed grid resumes where it stopped.

Such a file is called a cell. Its name holds a hash of everything that the cell depends on: the configuration of its
analysis except the fields declared free, the task, the content of rows and model, the values that set it apart from the
other cells of the grid, and `CELL_FORMAT`. Cells that differ in any of these have different names in the same folder,
so that no cell is taken for another. The file is written atomically when the cell is complete; its arrays are in a
second file beside it, which is written first. Both carry checksums, which are checked when they are read.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from analyses.records import environment, plain, read_arrays
from analyses.records.atomic import whole
from analyses.records.checked import read_checked, sha256, strict_json
from analyses.records.errors import RecordError
from propulsion.data import OwnTask
from propulsion.data.own import ROW_OPTIONS
from propulsion.errors import Interrupted, UserError
from propulsion.pretrained.options import LOADING_OPTIONS

ARRAYS = "arrays"
"""Key of the arrays, by their names, in what a cell computes; they are stored as arrays instead of JSON."""
CELL_FORMAT = 3
"""Increase this number when the code computes cells differently: older cells are then computed again."""
_CHECKSUM, _ARRAYS_CHECKSUM = "sha256", "arrays_sha256"
"""Keys of the checksums in a cell's file: of its other content as `_text` writes it, and of the file of its arrays."""
_LONGEST = 120  # Characters of a cell's name that its file's name keeps, since file systems limit names.
PLACES = frozenset({"output_dir", "runs_dir", "overwrite", "max_runs"})
"""Fields that say where a grid is stored and how many cells one call computes; free in every configuration."""


def settings_of(config: Any, *, free: Collection[str], task: Any, rows: str, model: str) -> dict[str, Any]:
    """The settings that all cells of a grid share and depend on.

    Args:
        config: The analysis' configuration, a dataclass. All of its fields count, with those of nested dataclasses,
            except `PLACES`, `ROW_OPTIONS`, `free`, and `LOADING_OPTIONS` that are not set, which older cells lack.
        free: Fields on which no cell depends: those that say which cells there are (each cell's own settings say which
            one it is), those that act on finished cells, and paths of files whose content is in the settings. A field
            of a nested dataclass is given by its path, such as "run.data_dir".
        task: The task, a dataclass.
        rows: Fingerprint of the rows.
        model: Identity of the model (`propulsion.identity.model_content`).
    """
    fields = dict(leaves(asdict(config)))
    free = {*free, *(PLACES & fields.keys())}
    # The task and the content of its rows, which the settings have, say what these options say.
    free |= {name for name in fields if name.rpartition(".")[2] in ROW_OPTIONS}
    free |= {name for name, value in fields.items() if name.rpartition(".")[2] in LOADING_OPTIONS and value is False}
    within = {name for name in free if not any(_is_within(field, name) for field in fields)}
    assert not within, f"the configuration has no field {within}"
    # The name of a task that is made from a user's rows is that of their folder.
    unnamed = {"name"} if isinstance(task, OwnTask) else set()
    task = {name: value for name, value in asdict(task).items() if name not in unnamed and not callable(value)}
    counted = {name: value for name, value in fields.items() if not any(_is_within(name, one) for one in free)}
    return plain({"config": counted, "task": task, "rows": rows, "model": model, "format": CELL_FORMAT})


class Grid:
    """A folder of cells, each computed once.

    Attributes:
        computed: Cells computed by this object.
        finished: Number of cells returned, computed now or earlier.
        missing: Names of cells that were not computed because `max_runs` was reached.
    """

    def __init__(self, folder: Path | str, max_runs: int | None = None) -> None:
        """A grid in a folder, which is created with the first cell.

        Args:
            folder: Where the cells' files are.
            max_runs: Compute this many cells and no more; no limit if None.
        """
        self._folder, self._max_runs = Path(folder).expanduser(), max_runs
        self.computed = self.finished = 0
        self.missing: list[str] = []

    def cell(self, name: str, settings: Mapping[str, Any], compute: Callable[[], Mapping[str, Any]]) -> Any:
        """Return the content of a cell, read from its file or computed now; None if `max_runs` were computed before.

        Args:
            name: Name of the cell in messages, and the beginning of its file's name.
            settings: Everything that the cell depends on, in types of JSON.
            compute: Computes the content.

        Raises:
            UserError: The cell's file is damaged, or cannot be written.
            Interrupted: The process was interrupted; the message says what is kept.
        """
        is_new = not self._folder.exists()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write the grid's folder {self._folder}: {error.strerror or error}") from error
        stem = re.sub(r"[^A-Za-z0-9_.=+-]+", "-", name)[:_LONGEST]
        path = self._folder / f"{stem}.{_key(settings)}.json"
        stored = _read(path, settings)
        if stored is not None and stored["cell"] != name:  # Two names may differ only in what a file's name leaves out.
            path = self._folder / f"{stem}.{_key([name, settings])}.json"
            stored = _read(path, settings)
        if stored is not None:
            self.finished += 1
            return _found(path, stored)
        if self._max_runs is not None and self.computed >= self._max_runs:
            self.missing.append(name)
            return None
        print(f"{name} ...{self._others(stem)}", flush=True)
        try:
            computed = compute()
        except KeyboardInterrupt as error:
            raise Interrupted(
                f"{self.finished} finished cells are in {self._folder}: the same command goes on with {name}"
            ) from error
        except UserError:
            if is_new:  # A cell that was refused leaves no empty folder.
                with suppress(OSError):
                    self._folder.rmdir()
            raise
        found = self._write(name, path, settings, computed)
        self.computed += 1
        self.finished += 1
        return found

    def _others(self, stem: str) -> str:
        """A note that counts the other cells of that name; "" if there are none."""
        count = sum(len(list(self._folder.glob(f"{stem}{key}.json"))) for key in ("", f".{'[0-9a-f]' * 16}"))
        return f" ({count} of other settings, rows or weights beside it)" if count else ""

    def _write(self, name: str, path: Path, settings: Mapping[str, Any], computed: Mapping[str, Any]) -> Any:
        arrays = computed.get(ARRAYS)
        found = plain({key: value for key, value in computed.items() if key != ARRAYS})
        content = {"cell": name, "settings": settings, "environment": environment(), "found": found}
        try:
            _save(path, content, arrays)
        except OSError as error:
            raise UserError(
                f"cannot write {path}: {error.strerror or error}{_rescue(path, content, arrays)}"
            ) from error
        return found if arrays is None else found | {ARRAYS: dict(arrays)}


class Cells:
    """The cells of a grid that share some settings."""

    def __init__(self, grid: Grid, settings: Mapping[str, Any]) -> None:
        self._grid, self._settings = grid, settings

    def cell(self, name: str, compute: Callable[..., Mapping[str, Any]], **own: Any) -> dict[str, Any] | None:
        """Return the content of a cell, read from its file or computed now; None if `max_runs` were computed before.

        Args:
            name: Name of the cell in messages, and the beginning of its file's name: another name is another cell.
            compute: Computes the content; called with `own` alone, so that nothing else can set this cell apart.
            **own: What the cell depends on beside the shared settings.

        Raises:
            UserError: The cell's file is damaged, or cannot be written.
            Interrupted: The process was interrupted; the message says what is kept.
        """
        return self._grid.cell(name, {**self._settings, "cell": plain(own)}, lambda: compute(**own))


def leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The options of a configuration and of those nested in it, by their paths, such as "run.data_dir"."""
    for name, value in config.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _is_within(field: str, name: str) -> bool:
    return field == name or field.startswith(f"{name}.")


def _key(settings: Any) -> str:
    return sha256(json.dumps(settings, sort_keys=True).encode())[:16]


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, allow_nan=False)


def _save(path: Path, content: dict[str, Any], arrays: Mapping[str, np.ndarray] | None) -> None:
    """Write a cell's file, and before it the file of its arrays if it has some, each with its checksum."""
    if arrays is not None:
        with whole(_beside(path)) as partial:
            with partial.open("wb") as file:
                np.savez_compressed(file, allow_pickle=False, **arrays)
            digest = sha256(partial.read_bytes())
        content = content | {
            ARRAYS: {key: list(value.shape) for key, value in arrays.items()},
            _ARRAYS_CHECKSUM: digest,
        }
    with whole(path) as partial:
        checked = content | {_CHECKSUM: sha256(_text(content).encode())}
        partial.write_text(_text(checked) + "\n", encoding="utf-8")


def _rescue(path: Path, content: dict[str, Any], arrays: Mapping[str, np.ndarray] | None) -> str:
    """Write a cell to a new folder for temporary files; a clause that says where, or "" if that fails too."""
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(prefix="cell-"))
        _save(folder / path.name, content, arrays)
    except OSError:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        return ""
    return f"; the finished cell is kept in {folder}: move its files to {path.parent}"


def _read(path: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The content of a cell's file, without its checksum; None if there is no such file.

    Raises:
        UserError: The file is damaged, or of other settings.
    """
    if not os.path.lexists(path):  # A link that leads nowhere is damage.
        return None
    try:
        content = strict_json(read_checked(path, None))
        if not isinstance(content, dict):
            raise ValueError("it is no object")
        digest = content.pop(_CHECKSUM, None)  # Earlier cells have none.
        if digest is not None and sha256(_text(content).encode()) != digest:
            raise ValueError("its content is not that of its checksum")
        if unknown := content.keys() - {"cell", "settings", "environment", "found", ARRAYS, _ARRAYS_CHECKSUM}:
            raise ValueError(f"it holds an unknown {min(unknown)}")
        if not isinstance(content["found"], dict) or not isinstance(content["cell"], str):
            raise ValueError("it holds no cell")
        if content["settings"] != settings:
            raise ValueError("its settings are not those of its name")
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it, and it will be computed again") from error
    return content


def _found(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """What a cell found, with its arrays.

    Raises:
        UserError: The file of its arrays is absent or damaged.
    """
    if content.get(ARRAYS) is None:
        return content["found"]
    try:
        return content["found"] | {ARRAYS: read_arrays(_beside(path), content[ARRAYS], content.get(_ARRAYS_CHECKSUM))}
    except (RecordError, AttributeError) as error:
        raise UserError(f"{error}; remove it and {path.name}, and they will be computed again") from error


def _beside(path: Path) -> Path:
    return path.with_suffix(".npz")
