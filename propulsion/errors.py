"""Exceptions for mistakes of the user, and their report by commands in one line."""

import difflib
import errno
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch


class UserError(ValueError):
    """A mistake that the user can correct. Its message says in one line what is wrong and what to do."""


class Problems(UserError):
    """Several mistakes, reported together in one line.

    Attributes:
        findings: The mistakes, each with its location, and each once.
        remedies: What to do about them, each remedy once.
    """

    def __init__(self, findings: Sequence[str], remedies: Sequence[str] = ()) -> None:
        self.findings, self.remedies = tuple(dict.fromkeys(findings)), tuple(dict.fromkeys(remedies))
        super().__init__("; ".join((*self.findings, *self.remedies)))


class Unusable(UserError):
    """Examples that cannot be used.

    Attributes:
        what: What is wrong with them.
        examples: Their indices, from 0.
        remedy: What to do.
    """

    def __init__(self, what: str, examples: Sequence[int], remedy: str) -> None:
        self.what, self.examples, self.remedy = what, tuple(examples), remedy
        super().__init__(f"{what}: {listed([f'example {index + 1}' for index in examples])}; {remedy}")


class Diverged(UserError):
    """A loss, a weight or an output of a model is not finite."""


class WriteError(UserError):
    """A checkpoint or a result could not be written."""


class NotFinite(Diverged):
    """The outputs of a model are not finite, so that they predict nothing."""


class Interrupted(KeyboardInterrupt):
    """An interrupt of work that can be resumed: its message says what is kept and how to resume."""


class Terminated(KeyboardInterrupt):
    """The signal SIGTERM, which a batch system sends when the time of a job is over."""


# Errors of the operating system about a path that the user named, or about a disk that cannot be written.
_ABOUT_PATHS = (
    errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT,
)  # fmt: skip


def run_command(main: Callable[[], None], *, mistakes: tuple[type[Exception], ...] = (UserError,)) -> None:
    """Run a command's main function, turning the user's mistakes into one line on stderr.

    Exit codes: 2 after one of the mistakes, a path that cannot be used (a name that is too long, a folder that may not
    be read), or a full disk, whichever library found it full; 130 after an interrupt and 143 after SIGTERM, as in
    shells. Any other exception is a defect of this package and keeps its traceback.
    """
    # Such warnings announce changes of libraries, and the user of a command can do nothing about them.
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        with _ended_as_if_interrupted():
            main()
    except mistakes as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _ABOUT_PATHS and error.filename is not None:
            words = f"cannot use {error.filename}: {error.strerror}"
        elif reason := full_disk(error):
            words = "; ".join([f"cannot write: {reason}", *getattr(error, "__notes__", ())])
        else:
            raise
        print(f"error: {words}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as error:
        terminated = isinstance(error, Terminated) or isinstance(error.__cause__, Terminated)
        words = f"; {one_line(error)}" if isinstance(error, Interrupted) else ""
        print(f"{'terminated' if terminated else 'interrupted'}{words}", file=sys.stderr)
        raise SystemExit(128 + (signal.SIGTERM if terminated else signal.SIGINT)) from None


@contextmanager
def _ended_as_if_interrupted() -> Iterator[None]:
    """Raise `Terminated` in the block on SIGTERM, so that messages are printed and temporary files removed."""
    # Only the main thread may set handlers, and a signal that is ignored, as under nohup, stays ignored.
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated

    def send_again(dropped: Any) -> None:
        # Python drops an exception that a signal raises in a destructor, and the command would go on.
        if not isinstance(dropped.exc_value, KeyboardInterrupt):
            report(dropped)
            return
        number = signal.SIGTERM if isinstance(dropped.exc_value, Terminated) else signal.SIGINT
        timer = threading.Timer(0.05, os.kill, (os.getpid(), number))
        timer.daemon = True
        timer.start()

    report = sys.unraisablehook
    signal.signal(signal.SIGTERM, end)
    sys.unraisablehook = send_again
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.unraisablehook = report


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def full_disk(error: BaseException | None) -> str | None:
    """The system's words if an error, or one that caused it, says that a disk or quota is full; otherwise None.

    Python raises `OSError` then. Libraries that write by code of their own (safetensors, tokenizers, torch) raise other
    exceptions, which can be recognised by their text alone.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        numbers = [int(number) for number in re.findall(r"os error (\d+)", str(error))]
        for number in [getattr(error, "errno", None), *numbers]:
            if number in _FULL:
                return os.strerror(number)
        if isinstance(error, RuntimeError) and re.search("PytorchStreamWriter|unexpected pos", str(error)):
            return first_line(error)
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def explained(what: str, kind: type[UserError] = UserError) -> Iterator[None]:
    """Turn an error of the system, or of a full disk, in the block into a `UserError`: "cannot WHAT: its reason"."""
    try:
        yield
    except Exception as error:
        reason = full_disk(error)
        # An OSError without a number is not the system's, such as that of a lock that is held.
        if reason is None and isinstance(error, OSError) and error.errno is not None:
            reason = error.strerror or str(error)
        if reason is None or isinstance(error, UserError):
            raise
        raise kind(f"cannot {what}: {reason}") from error


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turn whatever a library raises in the block into a `UserError`: "WHAT: REASON".

    It is for calls that hand a library the user's files or options. Libraries check few of these, and a wrong one may
    raise any exception. Mistakes that are found already and a lack of memory pass unchanged.
    """
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # Messages of other types, such as KeyError and TypeError, are fragments without the name of the type.
        explains = isinstance(error, (OSError, ValueError, RuntimeError, ImportError, AssertionError))
        name = "" if explains and str(error) else f"{type(error).__name__}: "
        raise UserError(f"{what}: {name}{first_line(error)}") from error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean X?)" for the known names that are similar to an unknown one; "" if none is.

    Names are compared without regard to case.
    """
    originals = {one.lower(): one for one in known}
    close = [originals[one] for one in difflib.get_close_matches(name.lower(), list(originals), n=2)]
    return f" (did you mean {' or '.join(close)}?)" if close else ""


_SHOWN = 3  # Number of items that a message lists.


def listed(items: Sequence[str], separator: str = ", ") -> str:
    """Join the first few items, and add the number of the others."""
    rest = len(items) - _SHOWN
    return separator.join((*items[:_SHOWN], *([f"and {rest:,} more"] if rest > 0 else [])))


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Make all calls and return their results, or raise the mistakes of all of them together.

    Raises:
        UserError: A call raised it.
    """
    results, errors = [], []
    for call in calls:
        try:
            results.append(call())
        except UserError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        findings = [f for e in errors for f in (e.findings if isinstance(e, Problems) else [str(e)])]
        raise Problems(findings, [r for e in errors if isinstance(e, Problems) for r in e.remedies])
    return results


def one_line(error: BaseException) -> str:
    """Return an exception's message on one line, or its class name where it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """Return the first line of the message of a library's exception; the others are mostly advice for programmers.

    If the first line ends in a colon, the second is added, and the number of the lines after it.
    """
    first, *rest = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if not first.endswith(":") or not rest:
        return first
    more = f" (and {len(rest) - 1} more)" if rest[1:] else ""
    return f"{first} {rest[0]}{more}"
