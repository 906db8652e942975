"""Result folders: each run of an analysis writes one, with `result.json`, `kernels.npz`, `SHA256SUMS` and the figures.

`result.json` holds the metrics with units and intervals, the tables, and what is needed to run the analysis again:
configuration, seed, versions, commit, identity of data and model. `kernels.npz` holds the arrays. The JSON is strict:
a value that is not finite is written as null. `SHA256SUMS` holds the checksums of both files, which are checked when
they are read; in a folder without it, as older versions wrote, damage is found only where a file no longer parses.

A folder appears at its destination only when it is complete. Everything is written to a hidden folder beside it,
`.NAME.partial-HOST-PID`, with `result.json` last, and that folder is then renamed. A killed run therefore leaves no
incomplete result, and a folder without `result.json` is never taken for a result.
"""

from __future__ import annotations

import contextlib
import glob
import io
import json
import math
import os
import shutil
import socket
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from analyses.records.checked import read_checked, sha256, strict_json
from analyses.records.errors import RecordError
from analyses.records.result import Metric, Result, plain

RESULT_FILE = "result.json"
ARRAYS_FILE = "kernels.npz"
SUMS_FILE = "SHA256SUMS"
_IN_SUMS = f"in {SUMS_FILE}"

_FORMAT = 1
_FIELDS: dict[str, type] = {
    "analysis": str, "seed": int, "config": dict, "metrics": list, "tables": dict, "arrays": dict, "model": dict,
    "dataset": dict, "environment": dict, "seconds": dict, "coverage": dict,
}  # fmt: skip
"""Type of each field of `result.json` beside its format."""
_RENAMED = {
    "steps": "max_steps",
    "batch_size": "per_device_train_batch_size",
    "warmup_ratio": "warmup_steps",
    "schedule": "lr_scheduler_type",
}
"""Today's name of each training option that had another name in results of earlier versions."""
_FIGURE_SUFFIXES = {".png", ".pdf", ".svg"}


def write_result(
    result: Result,
    output_dir: Path | str,
    *,
    figures: Callable[[Result, Path], object] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a result folder; it appears complete or not at all.

    Args:
        result: What to write.
        output_dir: The folder to create.
        figures: Draws the figures of a result into a folder. If it raises, the result is written without figures, so
            that the computation is not lost, and then the exception is raised again.
        overwrite: Whether to replace an existing result, which stays in place until the new one is complete.

    Returns:
        The folder written, absolute.

    Raises:
        RecordError: As `check_writable` does; or the disk is full, and the result was written to the system's folder of
            temporary files, which the message names.
    """
    output = check_writable(output_dir, overwrite=overwrite)
    partial = _hidden_sibling(output, "partial")
    try:
        partial.mkdir()
        drawing_error = _fill(partial, result, figures)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RecordError(f"cannot write {output}: {error.strerror or error}{_rescue(result, output)}") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _publish(partial, output, overwrite=overwrite)
    if drawing_error is not None:
        drawing_error.add_note(f"the numbers are safe, without figures, in {output}")
        raise drawing_error
    return output


def check_writable(output_dir: Path | str, *, overwrite: bool = False) -> Path:
    """Check that `write_result` can write to a folder. Call this before a long computation.

    Parent folders are created, and temporary folders that killed runs of this result left on this machine are removed.

    Args:
        output_dir: The folder to be created.
        overwrite: Whether an existing result may be replaced.

    Returns:
        The folder, absolute and with symbolic links resolved.

    Raises:
        RecordError: If the folder cannot be created; if it holds a result and `overwrite` is not set; if it holds
            anything that this project did not write, even with `overwrite`.
    """
    output = Path(output_dir)
    try:
        output = output.expanduser().resolve()
        _refuse_to_lose(output, overwrite=overwrite)
        probe = _hidden_sibling(output, "probe")
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(output)
        # A folder is created because access bits do not tell whether a file system is read-only or full.
        probe.mkdir()
        probe.rmdir()
    except RecordError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # Of a name with a null byte, and of a circle of links.
        reason = getattr(error, "strerror", None) or error
        raise RecordError(f"cannot write results to {output}: {reason}") from error
    return output


def result_folders(root: Path) -> list[Path]:
    """The result folders below a folder, sorted by path. Hidden folders, which killed runs leave, are not listed.

    Raises:
        RecordError: There is none.
    """
    try:
        found = sorted(path.parent for path in root.rglob(RESULT_FILE))
    except OSError as error:
        raise RecordError(f"cannot read {root}: {error.strerror or error}") from error
    found = [folder for folder in found if not any(p.startswith(".") for p in folder.relative_to(root).parts)]
    if not found:
        raise RecordError(f"{root} holds no result folder")
    return found


def load_result(path: Path | str, *, analysis: str | None = None) -> Result:
    """Read a result folder.

    Numbers, texts and arrays equal those that were written. Tuples become lists, and values that were not finite become
    None (the value of a metric: not-a-number).

    Args:
        path: The folder, or the `result.json` in it.
        analysis: If given, the analysis that the result must come from.

    Raises:
        RecordError: If it is not a result folder, is incomplete or damaged, or comes from another analysis.
    """
    folder = Path(path).expanduser()
    folder = folder.parent if folder.name == RESULT_FILE else folder
    content = _read_json(folder)
    if analysis is not None and content["analysis"] != analysis:
        raise RecordError(f"{folder} is a result of {content['analysis']!r}, not of {analysis!r}")
    if not (folder / ARRAYS_FILE).is_file():
        raise RecordError(f"{folder} is incomplete: it has no {ARRAYS_FILE}")
    shapes = {name: stored["shape"] for name, stored in content.pop("arrays").items()}
    metrics = [_metric(stored) for stored in content.pop("metrics")]
    arrays = read_arrays(folder / ARRAYS_FILE, shapes, _stored_sums(folder).get(ARRAYS_FILE), _IN_SUMS)
    content["config"] = _renamed(content["config"])
    return Result(metrics=metrics, arrays=arrays, **content)


# --- writing -------------------------------------------------------------------------------------------------------


def _refuse_to_lose(output: Path, *, overwrite: bool) -> None:
    if not output.exists():
        return
    if not output.is_dir():
        raise RecordError(f"cannot write results to {output}: it is a file; name a folder that does not exist yet")
    if output.is_mount():
        raise RecordError(f"cannot write results to {output}: it is a mount point; name a folder inside it")
    names = sorted(entry.name for entry in output.iterdir())
    if not names:
        return
    if RESULT_FILE not in names:
        raise RecordError(f"cannot write results to {output}: it holds something else ({names[0]}); name a new folder")
    if not overwrite:
        raise RecordError(f"{output} already holds a result; name another folder, or pass --overwrite")
    try:
        analysis = _read_json(output)["analysis"]
    except RecordError as error:
        raise RecordError(f"will not replace what is in {output}, which may be somebody's: {error}") from error
    if foreign := [name for name in names if not _is_of(analysis, output / name)]:
        raise RecordError(f"will not replace the result in {output}: it also holds {foreign[0]}; move that away first")


def _is_of(analysis: str, path: Path) -> bool:
    """Whether a file belongs to a result: the result itself, or a figure under the name of its analysis."""
    figure = path.suffix in _FIGURE_SUFFIXES and path.name.startswith(analysis)
    return path.is_file() and not path.is_symlink() and (path.name in (RESULT_FILE, ARRAYS_FILE, SUMS_FILE) or figure)


def _hidden_sibling(output: Path, purpose: str) -> Path:
    # The host is part of the name because on a shared file system another machine may use the same process id.
    return output.parent / f".{output.name}.{purpose}-{socket.gethostname()}-{os.getpid()}"


def _remove_leftovers(output: Path) -> None:
    prefix = f".{output.name}.partial-{socket.gethostname()}-"
    for leftover in output.parent.glob(glob.escape(prefix) + "*"):
        pid = leftover.name.removeprefix(prefix)
        # A leftover with result.json is a complete result that could not be renamed: its owner decides about it.
        if pid.isdigit() and not _is_alive(int(pid)) and not (leftover / RESULT_FILE).exists():
            shutil.rmtree(leftover, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # This process has written nothing yet, so the folder is of an earlier one with the same id.
    try:
        os.kill(pid, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return True


def _fill(folder: Path, result: Result, figures: Callable[[Result, Path], object] | None = None) -> Exception | None:
    """Write all files of a result into a folder, `result.json` last; return what drawing raised."""
    np.savez_compressed(folder / ARRAYS_FILE, allow_pickle=False, **result.arrays)
    drawing_error = _draw(figures, result, folder)
    text = _to_json(result).encode("utf-8")
    sums = {ARRAYS_FILE: sha256((folder / ARRAYS_FILE).read_bytes()), RESULT_FILE: sha256(text)}
    lines = "".join(f"{digest}  {name}\n" for name, digest in sums.items())  # As the command sha256sum reads them.
    (folder / SUMS_FILE).write_text(lines, encoding="utf-8")
    (folder / RESULT_FILE).write_bytes(text)
    return drawing_error


def _rescue(result: Result, output: Path) -> str:
    """Write a result, without figures, to a new folder for temporary files; a clause that says where, or ""."""
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(prefix=f"{output.name[:40]}-"))
        _fill(folder, result)
    except OSError:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        return ""
    return f"; the finished result is kept in {folder}"


def _draw(figures: Callable[[Result, Path], object] | None, result: Result, folder: Path) -> Exception | None:
    if figures is None:
        return None
    try:
        figures(result, folder)
    except Exception as error:
        for path in folder.iterdir():
            if path.name != ARRAYS_FILE:
                path.unlink()
        return error
    return None


def _publish(partial: Path, output: Path, *, overwrite: bool) -> None:
    previous = _hidden_sibling(output, "previous")
    try:
        # Checked again, since another run may have written its result here during the computation.
        _refuse_to_lose(output, overwrite=overwrite)
        with _moved_aside(output, previous):
            partial.rename(output)
    except (OSError, RecordError) as error:
        raise RecordError(f"{error}; the finished result is kept in {partial}") from error


@contextlib.contextmanager
def _moved_aside(output: Path, previous: Path) -> Iterator[None]:
    # Two renames, since no portable call swaps two folders. At every instant both results exist under some name.
    if not output.exists():
        yield
        return
    output.rename(previous)
    try:
        yield
    except BaseException:
        previous.rename(output)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def _to_json(result: Result) -> str:
    """The text of `result.json`: fields that identify the run first, long ones last, and only the arrays' shapes."""
    head = {"format": _FORMAT, "analysis": result.analysis, "seed": result.seed}
    names = ("model", "dataset", "config", "coverage", "seconds", "environment", "metrics", "tables")
    shapes = {k: {"shape": list(v.shape), "dtype": str(v.dtype)} for k, v in result.arrays.items()}
    content = head | {name: getattr(result, name) for name in names} | {"arrays": shapes}
    return json.dumps(plain(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


# --- reading -------------------------------------------------------------------------------------------------------


def _read_json(folder: Path) -> dict[str, Any]:
    """The fields of `result.json`, each of its type; without its format."""
    path = folder / RESULT_FILE
    try:
        if not folder.is_dir():
            raise RecordError(f"{folder} is not a result folder: there is no such folder")
        if not path.is_file():
            state = "incomplete" if (folder / ARRAYS_FILE).exists() else "not a result folder"
            raise RecordError(f"{folder} is {state}: it has no {RESULT_FILE}")
        content = strict_json(read_checked(path, _stored_sums(folder).get(RESULT_FILE), _IN_SUMS))
    except RecordError:
        raise
    except (OSError, ValueError) as error:
        raise RecordError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict) or not {"format", "analysis"} <= content.keys():
        raise RecordError(f"{folder} is not a result folder: its {RESULT_FILE} is not of this project")
    found = content.pop("format")
    if type(found) is not int or found != _FORMAT:
        raise RecordError(f"{folder} has result format {found}, this version reads {_FORMAT}: upgrade propulsion-ntk")
    if fault := _fault(content):
        raise RecordError(f"{path} is damaged or was written by another version: {fault}")
    return content


def _stored_sums(folder: Path) -> dict[str, str]:
    """SHA-256 of the files of a result by their names; none in a folder without checksums.

    Raises:
        RecordError: The file of checksums cannot be read, or does not list the files of a result.
    """
    path = folder / SUMS_FILE
    if not os.path.lexists(path):  # A link that leads nowhere is damage.
        return {}
    lines = [line.split() for line in read_checked(path, None).decode("utf-8", errors="replace").splitlines()]
    sums = {line[1]: line[0] for line in lines if len(line) == 2}
    if sums.keys() != {RESULT_FILE, ARRAYS_FILE}:
        raise RecordError(f"{path} is damaged: it must list the checksums of {RESULT_FILE} and {ARRAYS_FILE}")
    return sums


def _fault(content: dict[str, Any]) -> str | None:
    """What is wrong with the fields of a `result.json`, in words; None if each is there and of its type."""
    if missing := sorted(_FIELDS.keys() - content.keys()):
        return f"it has no {missing[0]}"
    if unknown := sorted(content.keys() - _FIELDS.keys()):
        return f"it has an unknown {unknown[0]}"
    if wrong := [name for name, expected in _FIELDS.items() if type(content[name]) is not expected]:
        return f"its {wrong[0]} is not of type {_FIELDS[wrong[0]].__name__}"
    if not all(type(rows) is list and all(type(row) is dict for row in rows) for rows in content["tables"].values()):
        return "a table is no list of rows"
    if not all(isinstance(stored, dict) and type(stored.get("shape")) is list for stored in content["arrays"].values()):
        return "an array has no shape"
    if not all(type(words) is str for words in content["coverage"].values()):
        return "what a kernel covers is not in words"
    if not all(_is_metric(stored) for stored in content["metrics"]):
        return "a metric lacks a value or has one of another type"
    return None


def _is_metric(stored: Any) -> bool:
    if not isinstance(stored, dict) or stored.keys() != Metric.__dataclass_fields__.keys():
        return False
    numbers, words = ("value", "low", "high"), ("name", "unit", "stage", "left", "right")
    are_numbers = all(stored[name] is None or type(stored[name]) in (int, float) for name in numbers)
    return are_numbers and all(type(stored[name]) is str for name in words)


def _renamed(config: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration with its training options under the names that they have now."""
    nested = {name: _renamed(value) if isinstance(value, dict) else value for name, value in config.items()}
    if "training" in nested:
        nested["training"] = {_RENAMED.get(name, name): value for name, value in nested["training"].items()}
    return nested


def _metric(stored: dict[str, Any]) -> Metric:
    # JSON has one type of number: 1.0 may be written as 1 by another tool, and is then read as an integer.
    value = stored["value"]
    numbers: dict[str, Any] = {end: None if stored[end] is None else float(stored[end]) for end in ("low", "high")}
    numbers["value"] = math.nan if value is None else float(value)
    return Metric(**stored | numbers)


# What numpy raises of damaged files: of a header that claims too much memory, of an unknown compression, of a flag
# that says the file is encrypted, and of a header that cannot be parsed.
_DAMAGES = (
    OSError, ValueError, EOFError, KeyError, TypeError, AttributeError, MemoryError, RuntimeError, SyntaxError,
    struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def read_arrays(
    path: Path, shapes: Mapping[str, list[int]], expected: str | None = None, where: str = "stored with it"
) -> dict[str, np.ndarray]:
    """Read the arrays of a file, which must be of these shapes.

    Args:
        path: The file.
        shapes: Shape of each array by its name.
        expected: SHA-256 of the file; not checked if None.
        where: Where that is, in messages.

    Raises:
        RecordError: The file is absent or damaged, or holds other arrays.
    """
    content = io.BytesIO(read_checked(path, expected, where))
    try:
        with np.load(content, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except _DAMAGES as error:
        raise RecordError(f"{path} is truncated or damaged: {error}") from error
    if extra := sorted(arrays.keys() - shapes.keys()):
        raise RecordError(f"{path} holds {extra[0]!r}, which is not listed: the files do not match")
    for name, shape in shapes.items():
        if name not in arrays or list(arrays[name].shape) != shape:
            raise RecordError(f"{path} does not hold {name!r} of shape {shape}: the files do not match")
    return arrays
