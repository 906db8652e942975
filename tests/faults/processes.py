"""Processes that are killed at random moments, that meet a full disk, or that work in one folder at the same time."""

import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from analyses.core.errors import run_command

SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM}
FULL_DISK, TWO_WRITERS = "full disk", "two writers"
KINDS = (*SIGNALS, FULL_DISK, TWO_WRITERS)


@dataclass(frozen=True)
class Command:
    """A command that writes into one folder, and what its folder must be.

    Attributes:
        name: Its name in tables.
        main: Carries it out; called with the folder, below which it writes everything.
        kept: The files of its finished parts in a folder, which the same command must use and not write again.
        unreadable: What stands in the place of a finished part and cannot be read, in words; empty if all is whole.
        differences: The names of what differs between a folder and that of an uninterrupted call; empty if nothing.
        done: Whether a folder holds the end, so that the command refuses to be called again.
        failed: Exit codes after a full disk.
    """

    name: str
    main: Callable[[Path], None]
    kept: Callable[[Path], Iterable[Path]]
    unreadable: Callable[[Path], str]
    differences: Callable[[Path, Path], list[str]]
    done: Callable[[Path], bool] = lambda folder: False
    failed: tuple[int, ...] = (2,)


def start(command: Command, folder: Path, errors: Path, largest_file: int | None = None) -> multiprocessing.Process:
    """Start a command in a process of its own, forked so that it need not import torch again.

    Args:
        command: The command.
        folder: Where it writes.
        errors: The file that gets its standard error.
        largest_file: Limit on the bytes of each file, which stands for the space on its disk.
    """
    process = multiprocessing.get_context("fork").Process(
        target=_carry_out, args=(command, folder, errors, largest_file)
    )
    process.start()
    return process  # pyright: ignore[reportReturnType]


def _carry_out(command: Command, folder: Path, errors: Path, largest_file: int | None) -> None:
    os.setsid()  # Its children are then found by their session.
    for stream, path in ((sys.stdout, os.devnull), (sys.stderr, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
    folder.mkdir(exist_ok=True)
    tempfile.tempdir = str(folder.parent)
    if largest_file is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    run_command(lambda: command.main(folder))


def finish(command: Command, folder: Path) -> float:
    """Run a command to its end, and return the seconds that it took.

    Raises:
        AssertionError: It failed.
    """
    errors, started = folder.with_suffix(".err"), time.perf_counter()
    process = start(command, folder, errors)
    process.join()
    assert process.exitcode == 0, f"exit code {process.exitcode} at the end: {errors.read_text().strip()}"
    return time.perf_counter() - started


def fault(
    command: Command, folder: Path, expected: Path, kind: str, seconds: float, draw: random.Random, most: int = 3
) -> str:
    """Put a fault to a command, let it end, and compare its folder with that of an uninterrupted call.

    Args:
        command: The command.
        folder: A folder that does not exist yet.
        expected: The folder of the uninterrupted call.
        kind: One of `KINDS`.
        seconds: Time that the uninterrupted call took.
        draw: Draws the moment, or the size of the disk.
        most: Interruptions in a row.

    Returns:
        What went wrong; empty if the command has survived.
    """
    try:
        if kind == TWO_WRITERS:
            kept, problem = {}, _share(command, folder, seconds, draw)
        else:
            kept, problem = _interrupted(command, folder, expected, kind, seconds, draw, most)
        if problem:
            return problem
        if not command.done(folder):
            finish(command, folder)
        changed = [path for path, before in kept.items() if not path.exists() or _identity(path) != before]
        again = [f"{path.name} was written again" for path in changed]
        left = [path for path in folder.rglob("*") if ".partial" in path.name or path.name.endswith(".lock")]
        wrong = [*again, *(f"{path.name} is left behind" for path in left), *command.differences(folder, expected)]
        return ", ".join(wrong)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _interrupted(
    command: Command, folder: Path, expected: Path, kind: str, seconds: float, draw: random.Random, most: int
) -> tuple[dict[Path, tuple[int, int]], str]:
    """Interrupt a command at least once, and at most so many times.

    Returns:
        The files of the parts that were finished after the last interruption; and what went wrong, or an empty text.
    """
    kept: dict[Path, tuple[int, int]] = {}
    wanted, times = draw.randint(1, most), 0
    while times < wanted:
        code, problem = _interrupt(command, folder, expected, kind, seconds, draw)
        if problem:
            return kept, problem
        if code:
            times += 1
            kept |= {path: _identity(path) for path in command.kept(folder)}
        elif times:  # It has ended before the next fault.
            break
        else:  # It has ended before the first fault, which is put to a new one.
            shutil.rmtree(folder)
    return kept, ""


def _interrupt(
    command: Command, folder: Path, expected: Path, kind: str, seconds: float, draw: random.Random
) -> tuple[int, str]:
    """Start a command and interrupt it once; its exit code, and what went wrong, or an empty text."""
    errors = folder.with_suffix(".err")
    sizes = [path.stat().st_size for path in expected.rglob("*") if path.is_file()]
    process = start(command, folder, errors, draw.randint(500, max(sizes)) if kind == FULL_DISK else None)
    if kind != FULL_DISK:
        process.join(draw.uniform(0, seconds))
        if process.is_alive():
            os.kill(process.pid, SIGNALS[kind])  # pyright: ignore[reportArgumentType]
    process.join()
    code, words = process.exitcode or 0, errors.read_text()
    if left := _computing(process.pid or 0):
        return code, f"a child is left computing: {left}"
    if "Traceback" in words:
        return code, f"it did not end in one line, but with:\n{words}"
    codes = command.failed if kind == FULL_DISK else (-SIGNALS[kind], 143)
    if code not in (0, *codes):
        return code, f"exit code {code}: {words.strip()}"
    if code == 2 and len(_mistakes(words)) != 1:
        return code, f"it did not end in one line, but with:\n{words}"
    return code, command.unreadable(folder)


def _share(command: Command, folder: Path, seconds: float, draw: random.Random) -> str:
    """Start a command twice in one folder; what went wrong, or an empty text."""
    errors = [folder.with_suffix(f".{number}.err") for number in range(2)]
    one = start(command, folder, errors[0])
    one.join(draw.uniform(0, seconds / 5))
    if not one.is_alive():  # It has ended before the other starts.
        shutil.rmtree(folder)
        return _share(command, folder, seconds, draw)
    other = start(command, folder, errors[1])
    for process in (one, other):
        process.join()
    codes, words = [one.exitcode, other.exitcode], [path.read_text() for path in errors]
    if sorted(map(str, codes)) != ["0", "2"]:
        return f"exit codes {codes}: {words}"
    winner, told = (one, words[1]) if one.exitcode == 0 else (other, words[0])
    mistakes = _mistakes(told)
    if len(mistakes) != 1 or not re.search(rf" is in use by process {winner.pid} on \S+: wait for it", mistakes[0]):
        return f"process {winner.pid} won, and the other said: {told}"
    return command.unreadable(folder)


def _mistakes(words: str) -> list[str]:
    return [line for line in words.splitlines() if line.startswith("error: ")]


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def _computing(session: int) -> str:
    """The processes of a session that still compute after some seconds; they are killed."""
    found = []
    for _ in range(100):
        found = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _is_in(session, pid)]
        if not found:
            return ""
        time.sleep(0.1)
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    return ", ".join(map(str, found))


def _is_in(session: int, pid: int) -> bool:
    """Whether a process is of a session and has not ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return False
    return int(fields[3]) == session and fields[0] not in "ZX"
