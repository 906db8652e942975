"""The exception for mistakes of the user in this package, and how commands that only read results report it."""

import sys
from collections.abc import Callable


class RecordError(ValueError):
    """A mistake that the user can correct. Its message says in one line what is wrong and what to do."""


def one_line(error: BaseException) -> str:
    """An exception's message on one line, or its class name where it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def run_command(main: Callable[[], None]) -> None:
    """Run a command's main function; a `RecordError` becomes one line on stderr and exit code 2."""
    try:
        main()
    except RecordError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
