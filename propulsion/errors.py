"""Mistakes of the user: one exception class, and how a command reports it."""

import sys
import warnings
from collections.abc import Callable


class UserError(ValueError):
    """A mistake the user can mend: its message says in one line what is wrong and what to do."""


class Diverged(UserError):
    """The loss or a weight stopped being finite in training."""


def run_command(main: Callable[[], None]) -> None:
    """Run a command's main function, turning the user's mistakes into one line on stderr.

    Exit codes: 2 after a `UserError`, 130 after an interrupt, as shells report it. Any other exception is a defect of
    ours and keeps its traceback.
    """
    # Libraries announce their own plans by these; who runs a command can do nothing about them.
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        main()
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        raise SystemExit(130) from None


def one_line(error: BaseException) -> str:
    """Return an exception's message on one line, or its class name where it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """Return the first line of another library's message: what follows it is mostly advice for that library's users."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
