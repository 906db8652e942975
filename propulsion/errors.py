"""Mistakes of the user: one exception class, and how a command reports it."""

import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any


class UserError(ValueError):
    """A mistake the user can mend: its message says in one line what is wrong and what to do."""


class Problems(UserError):
    """Several mistakes, told together on one line, and what to do about them.

    Attributes:
        findings: What is wrong, each with where it is.
        remedies: What to do, each once.
    """

    def __init__(self, findings: Sequence[str], remedies: Sequence[str] = ()) -> None:
        self.findings, self.remedies = tuple(findings), tuple(dict.fromkeys(remedies))
        super().__init__("; ".join((*self.findings, *self.remedies)))


class Unusable(UserError):
    """Examples that cannot be used.

    Attributes:
        what: What is wrong with them.
        examples: Which they are, from 0.
        remedy: What to do.
    """

    def __init__(self, what: str, examples: Sequence[int], remedy: str) -> None:
        self.what, self.examples, self.remedy = what, tuple(examples), remedy
        super().__init__(f"{what}: {listed([f'example {place + 1}' for place in examples])}; {remedy}")


class Diverged(UserError):
    """The loss or a weight stopped being finite in training."""


class Interrupted(KeyboardInterrupt):
    """An interrupt of work of which a part is kept: its message says what is there and how to go on."""


class Terminated(KeyboardInterrupt):
    """A request to end, as from a batch system whose time is up: SIGTERM."""


def run_command(main: Callable[[], None], *, mistakes: tuple[type[Exception], ...] = (UserError,)) -> None:
    """Run a command's main function, turning the user's mistakes into one line on stderr.

    Exit codes: 2 after one of the mistakes, 130 after an interrupt and 143 after SIGTERM, as shells report them. Any
    other exception is a defect of ours and keeps its traceback.
    """
    # Libraries announce their own plans by these; who runs a command can do nothing about them.
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        with _ended_as_if_interrupted():
            main()
    except mistakes as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as error:
        terminated = isinstance(error, Terminated) or isinstance(error.__cause__, Terminated)
        words = f"; {one_line(error)}" if isinstance(error, Interrupted) else ""
        print(f"{'terminated' if terminated else 'interrupted'}{words}", file=sys.stderr)
        raise SystemExit(128 + (signal.SIGTERM if terminated else signal.SIGINT)) from None


@contextmanager
def _ended_as_if_interrupted() -> Iterator[None]:
    """Let SIGTERM end the block by `Terminated`, so that what is kept is said, and temporary files go."""
    # Only a main thread may set handlers, and a signal that is ignored, as under nohup, stays so.
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


_SHOWN = 3  # Of many mistakes of one kind in one file.


def listed(items: Sequence[str], separator: str = ", ") -> str:
    """The first few of many items, and how many more there are."""
    rest = len(items) - _SHOWN
    return separator.join((*items[:_SHOWN], *([f"and {rest:,} more"] if rest > 0 else [])))


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Make all calls, and return what they return, or raise the mistakes of all of them as one.

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
    """Return the first line of another library's message: what follows it is mostly advice for that library's users.

    A line that ends in a colon only announces causes: the first of them follows it, and how many more there are.
    """
    first, *rest = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if not first.endswith(":") or not rest:
        return first
    more = f" (and {len(rest) - 1} more)" if rest[1:] else ""
    return f"{first} {rest[0]}{more}"
