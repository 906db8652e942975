"""Result folders: each run of an analysis writes one, with `result.json`, `kernels.npz` and the figures.

`result.json` holds the metrics with units and intervals, the tables, and what is needed to run the analysis again:
configuration, seed, versions, commit, identity of data and model. `kernels.npz` holds the arrays. The JSON is strict:
a value that is not finite is written as null.

A folder appears at its destination only when it is complete. Everything is written to a hidden folder beside it,
`.NAME.partial-HOST-PID`, with `result.json` last, and that folder is then renamed. A killed run therefore leaves no
incomplete result, and a folder without `result.json` is never taken for a result.
"""

from __future__ import annotations

import contextlib
import glob
import json
import math
import os
import shutil
import socket
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from analyses.records.errors import RecordError
from analyses.records.result import Metric, Result, plain

RESULT_FILE = "result.json"
ARRAYS_FILE = "kernels.npz"

_FORMAT = 1
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
        RecordError: As `check_writable` does.
    """
    output = check_writable(output_dir, overwrite=overwrite)
    partial = _hidden_sibling(output, "partial")
    partial.mkdir()
    try:
        np.savez_compressed(partial / ARRAYS_FILE, allow_pickle=False, **result.arrays)
        drawing_error = _draw(figures, result, partial)
        (partial / RESULT_FILE).write_text(_to_json(result), encoding="utf-8")
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
    output = Path(output_dir).expanduser().resolve()
    _refuse_to_lose(output, overwrite=overwrite)
    probe = _hidden_sibling(output, "probe")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(output)
        # A folder is created because access bits do not tell whether a file system is read-only or full.
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise RecordError(f"cannot write results to {output}: {error.strerror or error}") from error
    return output


def result_folders(root: Path) -> list[Path]:
    """The result folders below a folder, sorted by path. Hidden folders, which killed runs leave, are not listed.

    Raises:
        RecordError: There is none.
    """
    found = sorted(path.parent for path in root.rglob(RESULT_FILE))
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
    try:
        shapes = {name: stored["shape"] for name, stored in content.pop("arrays").items()}
        metrics = [Metric(**_undefined_as_nan(m)) for m in content.pop("metrics")]
        if not (folder / ARRAYS_FILE).is_file():
            raise RecordError(f"{folder} is incomplete: it has no {ARRAYS_FILE}")
        content["config"] = _renamed(content["config"])
        result = Result(metrics=metrics, arrays=read_arrays(folder / ARRAYS_FILE, shapes), **content)
    except (TypeError, KeyError, AttributeError) as error:
        raise RecordError(f"{folder / RESULT_FILE} is damaged or was written by another version: {error}") from error
    return result


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
    return path.is_file() and not path.is_symlink() and (path.name in (RESULT_FILE, ARRAYS_FILE) or figure)


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
    if not folder.is_dir():
        raise RecordError(f"{folder} is not a result folder: there is no such folder")
    path = folder / RESULT_FILE
    if not path.is_file():
        state = "incomplete" if (folder / ARRAYS_FILE).exists() else "not a result folder"
        raise RecordError(f"{folder} is {state}: it has no {RESULT_FILE}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict) or not {"format", "analysis"} <= content.keys():
        raise RecordError(f"{folder} is not a result folder: its {RESULT_FILE} is not of this project")
    if (found := content.pop("format")) != _FORMAT:
        raise RecordError(f"{folder} has result format {found}, this version reads {_FORMAT}: upgrade propulsion-ntk")
    return content


def _renamed(config: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration with its training options under the names that they have now."""
    nested = {name: _renamed(value) if isinstance(value, dict) else value for name, value in config.items()}
    if "training" in nested:
        nested["training"] = {_RENAMED.get(name, name): value for name, value in nested["training"].items()}
    return nested


def _undefined_as_nan(metric: dict[str, Any]) -> dict[str, Any]:
    # JSON has one type of number: 1.0 may be written as 1 by another tool, and is then read as an integer.
    value = metric["value"]
    ends = {end: None if metric[end] is None else float(metric[end]) for end in ("low", "high")}
    return metric | ends | {"value": math.nan if value is None else float(value)}


def read_arrays(path: Path, shapes: Mapping[str, list[int]]) -> dict[str, np.ndarray]:
    """Read the arrays of a file, which must be of these shapes.

    Raises:
        RecordError: The file is absent or damaged, or holds other arrays.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise RecordError(f"{path} is truncated or damaged: {error}") from error
    for name, shape in shapes.items():
        if name not in arrays or list(arrays[name].shape) != shape:
            raise RecordError(f"{path} does not hold {name!r} of shape {shape}: the files do not match")
    return arrays
