"""What an analysis leaves behind: one folder a run, holding `result.json` and `kernels.npz`, with figures beside them.

`result.json` carries everything a reader or a replay needs (metrics with units and intervals, tables, configuration,
seed, versions, commit, data and model identity, times); `kernels.npz` carries the arrays. The JSON is strict: a
value that is not finite is written as null.

A folder appears at its destination only when it is complete. Everything is written to a hidden sibling,
`.NAME.partial-HOST-PID`, with `result.json` last, and renamed; so a killed run leaves no half result, and a folder
without `result.json` is never mistaken for one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import json
import math
import os
import platform
import shutil
import socket
import subprocess
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from propulsion.errors import UserError

RESULT_FILE = "result.json"
ARRAYS_FILE = "kernels.npz"
STAGES = ("initialisation", "trained")

_FORMAT = 1
_FIGURE_SUFFIXES = {".png", ".pdf", ".svg"}


@dataclass(frozen=True)
class Metric:
    """One number about one kernel or one pair of kernels.

    Attributes:
        name: The quantity, such as "cka" or "relative_frobenius".
        value: Its value; not-a-number where the quantity is undefined.
        low: Lower end of its interval, None if it has none.
        high: Upper end of its interval, None if it has none.
        unit: Unit in words, "" for a pure number.
        stage: "initialisation" or "trained".
        left: The kernel it is about.
        right: The kernel, or null model, that `left` is compared with; "" for a metric of one kernel.
    """

    name: str
    value: float
    low: float | None
    high: float | None
    unit: str
    stage: str
    left: str
    right: str


@dataclass(frozen=True)
class Result:
    """All that one run of one analysis found, and how it was found.

    Attributes:
        analysis: Name of the analysis, such as "kernel_distance".
        config: The full configuration; with `seed`, enough to run it again.
        seed: Seed of every random choice.
        metrics: Numbers about kernels and pairs of kernels.
        tables: Further named tables, each a list of rows.
        arrays: Kernels, spectra and labels; a kernel is named "STAGE.KERNEL", its spectrum "spectrum.STAGE.KERNEL".
        model: Identity of the model.
        dataset: Identity of the data; "label_names" (None for regression) and "task" among them.
        environment: What `environment` returned.
        seconds: Wall time of each step, in seconds.
        coverage: Which parameters each kernel covers, in words with their count.
    """

    analysis: str
    config: dict[str, Any]
    seed: int
    metrics: list[Metric]
    tables: dict[str, list[dict[str, Any]]]
    arrays: dict[str, np.ndarray]
    model: dict[str, Any]
    dataset: dict[str, Any]
    environment: dict[str, Any]
    seconds: dict[str, Any]
    coverage: dict[str, str]

    def metric(self, name: str, *, stage: str, left: str, right: str = "") -> Metric:
        """Return the metric of that name for one kernel or one pair.

        Raises:
            UserError: If this result does not hold it, or holds it more than once.
        """
        key = (name, stage, left, right)
        found = [m for m in self.metrics if (m.name, m.stage, m.left, m.right) == key]
        if len(found) != 1:
            pair = f"{left} and {right}" if right else left
            count = "no" if not found else f"{len(found)} times the"
            raise UserError(f"the result holds {count} metric {name!r} of {pair} at stage {stage!r}")
        return found[0]


def write_result(
    result: Result,
    output_dir: Path | str,
    *,
    figures: Callable[[Result, Path], object] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a result folder, whole or not at all.

    Args:
        result: What to write.
        output_dir: The folder to create.
        figures: Draws the figures of a result into a folder. If it raises, the numbers are written all the same,
            without figures, before the exception goes on: a drawing is not worth losing a computation for.
        overwrite: Whether to replace an existing result, which stays in place until the new one is complete.

    Returns:
        The folder written, absolute.

    Raises:
        UserError: As `check_writable` does.
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
    """Make sure that `write_result` will be able to write there; call it before hours of computing.

    Parent folders are created, and what killed runs on this machine left of this result is removed.

    Args:
        output_dir: The folder to be created.
        overwrite: Whether an existing result may be replaced.

    Returns:
        The folder, absolute and with symbolic links resolved.

    Raises:
        UserError: If the folder cannot be created; if it holds a result and `overwrite` is not set; if it holds
            anything that this project did not write, even with `overwrite`.
    """
    output = Path(output_dir).expanduser().resolve()
    _refuse_to_lose(output, overwrite=overwrite)
    probe = _hidden_sibling(output, "probe")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(output)
        # Creating a folder is the only honest test: access bits say nothing of read-only or full file systems.
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise UserError(f"cannot write results to {output}: {error.strerror or error}") from error
    return output


def load_result(path: Path | str, *, analysis: str | None = None) -> Result:
    """Read a result folder back.

    Numbers, texts and arrays come back equal; tuples as lists, and values that were not finite as None (a metric's
    value as not-a-number).

    Args:
        path: The folder, or the `result.json` in it.
        analysis: If given, the analysis that the result must come from.

    Raises:
        UserError: If it is not a result folder, is incomplete or damaged, or comes from another analysis.
    """
    folder = Path(path).expanduser()
    folder = folder.parent if folder.name == RESULT_FILE else folder
    content = _read_json(folder)
    if analysis is not None and content["analysis"] != analysis:
        raise UserError(f"{folder} is a result of {content['analysis']!r}, not of {analysis!r}")
    try:
        shapes = content.pop("arrays")
        metrics = [Metric(**_undefined_as_nan(m)) for m in content.pop("metrics")]
        result = Result(metrics=metrics, arrays=_read_arrays(folder, shapes), **content)
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{folder / RESULT_FILE} is damaged or was written by another version: {error}") from error
    return result


def environment() -> dict[str, Any]:
    """Describe the software and machine of this run: what a reader needs to explain a difference in the digits.

    Returns:
        Versions of Python and of the libraries (None if not installed), platform, thread count and accelerator, and the
        commit of the code with whether it had uncommitted changes (both None outside a git checkout).
    """
    import torch  # Here, since reading a result should not cost the import.

    libraries = ("torch", "transformers", "peft", "numpy", "scipy")
    commit, dirty = _commit(Path(__file__).resolve().parents[1])
    return {
        "propulsion_ntk": _version("propulsion-ntk"),
        "python": platform.python_version(),
        **{name: _version(name) for name in libraries},
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": commit,
        "dirty": dirty,
    }


# --- writing -------------------------------------------------------------------------------------------------------


def _refuse_to_lose(output: Path, *, overwrite: bool) -> None:
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"cannot write results to {output}: it is a file; name a folder that does not exist yet")
    if output.is_mount():
        raise UserError(f"cannot write results to {output}: it is a mount point; name a folder inside it")
    names = sorted(entry.name for entry in output.iterdir())
    if names and RESULT_FILE not in names:
        raise UserError(f"cannot write results to {output}: it holds something else ({names[0]}); name a new folder")
    if names and not overwrite:
        raise UserError(f"{output} already holds a result; name another folder, or pass --overwrite")
    if not names:
        return
    try:
        analysis = _read_json(output)["analysis"]
    except UserError as error:
        raise UserError(f"will not replace what is in {output}, which may be somebody's: {error}") from error
    if foreign := [name for name in names if not _is_of(analysis, output / name)]:
        raise UserError(f"will not replace the result in {output}: it also holds {foreign[0]}; move that away first")


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
        # A leftover with result.json is complete (it only missed its rename): that is for its owner to delete.
        if pid.isdigit() and not _is_alive(int(pid)) and not (leftover / RESULT_FILE).exists():
            shutil.rmtree(leftover, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # This process is not writing yet, so the folder is from an earlier one with the same id.
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
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
        # Looked at again: hours may have passed, and another run may have finished here meanwhile.
        _refuse_to_lose(output, overwrite=overwrite)
        with _moved_aside(output, previous):
            partial.rename(output)
    except (OSError, UserError) as error:
        raise UserError(f"{error}; the finished result is kept in {partial}") from error


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
    """Put what identifies the run first, its long parts last, and the arrays' shapes in place of the arrays."""
    head = {"format": _FORMAT, "analysis": result.analysis, "seed": result.seed}
    names = ("model", "dataset", "config", "coverage", "seconds", "environment", "metrics", "tables")
    shapes = {k: {"shape": list(v.shape), "dtype": str(v.dtype)} for k, v in result.arrays.items()}
    content = head | {name: getattr(result, name) for name in names} | {"arrays": shapes}
    return json.dumps(plain(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """Reduce a value to what strict JSON can say; what it cannot (a path, a dtype) becomes its text."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, np.generic | np.ndarray):
        return plain(value.tolist())
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((plain(entry) for entry in value), key=str)
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return str(value)


# --- reading -------------------------------------------------------------------------------------------------------


def _read_json(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError(f"{folder} is not a result folder: there is no such folder")
    path = folder / RESULT_FILE
    if not path.is_file():
        state = "incomplete" if (folder / ARRAYS_FILE).exists() else "not a result folder"
        raise UserError(f"{folder} is {state}: it has no {RESULT_FILE}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict) or not {"format", "analysis"} <= content.keys():
        raise UserError(f"{folder} is not a result folder: its {RESULT_FILE} is not of this project")
    if (found := content.pop("format")) != _FORMAT:
        raise UserError(f"{folder} has result format {found}, this version reads {_FORMAT}: upgrade propulsion-ntk")
    return content


def _undefined_as_nan(metric: dict[str, Any]) -> dict[str, Any]:
    # JSON has one number type, so 1.0 written by another tool comes back as an integer.
    value = metric["value"]
    ends = {end: None if metric[end] is None else float(metric[end]) for end in ("low", "high")}
    return metric | ends | {"value": math.nan if value is None else float(value)}


def _read_arrays(folder: Path, shapes: dict[str, Any]) -> dict[str, np.ndarray]:
    path = folder / ARRAYS_FILE
    if not path.is_file():
        raise UserError(f"{folder} is incomplete: it has no {ARRAYS_FILE}")
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is truncated or damaged: {error}") from error
    for name, expected in shapes.items():
        if name not in arrays or list(arrays[name].shape) != expected["shape"]:
            raise UserError(f"{path} does not hold {name!r} of shape {expected['shape']}: the files do not match")
    return arrays


# --- environment ---------------------------------------------------------------------------------------------------


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit(root: Path) -> tuple[str | None, bool | None]:
    top = _git(root, "rev-parse", "--show-toplevel")
    # A virtual environment often lies inside some other repository, whose commit says nothing about this code.
    if top is None or Path(top).resolve() != root:
        return None, None
    code = ("analyses", "figures", "ntk", "propulsion", "pyproject.toml")
    changes = _git(root, "status", "--porcelain", "--", *code)
    return _git(root, "rev-parse", "HEAD"), None if changes is None else bool(changes)


def _git(root: Path, *arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(root), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
