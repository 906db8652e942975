"""Grids of training runs that take hours: each finished run is a file, so that a killed grid resumes where it stopped.

Such a file is called a cell. Its name holds a hash of everything that the cell depends on: the configuration of its
analysis except the fields declared free, the task, the content of rows and model, the values that set it apart from the
other cells of the grid, and `CELL_FORMAT`. Cells that differ in any of these have different names in the same folder,
so that no cell is taken for another. The file is written atomically when the cell is complete; its arrays are in a
second file beside it, which is written first.
"""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from analyses.records import environment, plain, read_arrays
from analyses.records.atomic import whole
from analyses.records.errors import RecordError
from propulsion.errors import Interrupted, UserError

ARRAYS = "arrays"
"""Key of the arrays, by their names, in what a cell computes; they are stored as arrays instead of JSON."""
CELL_FORMAT = 3
"""Increase this number when the code computes cells differently: older cells are then computed again."""
_LONGEST = 120  # Characters of a cell's name that its file's name keeps, since file systems limit names.
PLACES = frozenset({"output_dir", "runs_dir", "overwrite", "max_runs"})
"""Fields that say where a grid is stored and how many cells one call computes; free in every configuration."""


def settings_of(config: Any, *, free: Collection[str], task: Any, rows: str, model: str) -> dict[str, Any]:
    """The settings that all cells of a grid share and depend on.

    Args:
        config: The analysis' configuration, a dataclass. All of its fields count, with those of nested dataclasses,
            except `PLACES` and `free`.
        free: Fields on which no cell depends: those that say which cells there are (each cell's own settings say which
            one it is), those that act on finished cells, and paths of files whose content is in the settings. A field
            of a nested dataclass is given by its path, such as "run.data_dir".
        task: The task, a dataclass.
        rows: Fingerprint of the rows.
        model: Identity of the model (`propulsion.identity.model_content`).
    """
    fields = dict(_leaves(asdict(config)))
    free = {*free, *(PLACES & fields.keys())}
    within = {name for name in free if not any(_is_within(field, name) for field in fields)}
    assert not within, f"the configuration has no field {within}"
    task = {name: value for name, value in asdict(task).items() if not callable(value)}
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
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write the grid's folder {self._folder}: {error.strerror or error}") from error
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        stem = re.sub(r"[^A-Za-z0-9_.=+-]+", "-", name)[:_LONGEST]
        path = self._folder / f"{stem}.{key[:16]}.json"
        if path.exists():
            found = _read(path, settings)
            self.finished += 1
            return found
        if self._max_runs is not None and self.computed >= self._max_runs:
            self.missing.append(name)
            return None
        print(f"{name} ...{self._others(stem)}", flush=True)
        try:
            found = self._write(name, path, settings, compute())
        except KeyboardInterrupt as error:
            raise Interrupted(
                f"{self.finished} finished cells are in {self._folder}: the same command goes on with {name}"
            ) from error
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
            if arrays is not None:
                content |= {ARRAYS: {key: list(value.shape) for key, value in arrays.items()}}
                with whole(_beside(path)) as partial, partial.open("wb") as file:
                    np.savez_compressed(file, allow_pickle=False, **arrays)
            with whole(path) as partial:
                partial.write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
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


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _is_within(field: str, name: str) -> bool:
    return field == name or field.startswith(f"{name}.")


def _read(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found, stored = content["found"], content["settings"]
        arrays = content.get(ARRAYS)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it, and it will be computed again") from error
    if stored != settings:
        raise UserError(f"{path} is damaged (its settings are not those of its name): remove it, and it will be "
                        "computed again")  # fmt: skip
    if arrays is None:
        return found
    try:
        return found | {ARRAYS: read_arrays(_beside(path), arrays)}
    except RecordError as error:
        raise UserError(f"{error}; remove it and {path.name}, and they will be computed again") from error


def _beside(path: Path) -> Path:
    return path.with_suffix(".npz")
