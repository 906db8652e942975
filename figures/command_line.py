"""Command lines of figures: a mistake in an option is one line.

`propulsion.command_line` does the same for other commands; figures import no package that loads a model library.
"""

import contextlib
import functools
import io
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import tyro

from analyses.records.errors import RecordError


def call(main: Callable[..., Any], *, prog: str, description: str | None = None) -> Any:
    """Call a function, or make an object, with arguments from the command line.

    Raises:
        RecordError: An option is unknown, lacks its value, or has one that cannot be used; or the function raises it.
    """

    @functools.wraps(main, updated=())
    def bound(*args: Any, **options: Any) -> Callable[[], Any]:
        return functools.partial(main, *args, **options)

    before, box = os.environ.get("COLUMNS"), io.StringIO()
    if not {"-h", "--help"} & {*sys.argv}:
        os.environ["COLUMNS"] = "100000"  # So that tyro does not wrap its messages.
    try:
        with contextlib.redirect_stderr(box):
            asked = tyro.cli(bound, prog=prog, description=description)
    except SystemExit as end:
        if not end.code:
            raise
        # tyro's messages are boxes, of ASCII characters in some terminals, with help below a horizontal line.
        lines = [line.strip("│|╭╮╰╯+ ") for line in box.getvalue().splitlines()[1:]]
        parts = re.split(r"^[─-]{3,}$", "\n".join(lines), flags=re.MULTILINE)
        message = " ".join(next(part for part in parts if part.strip()).split()).rstrip(".")
        raise RecordError(f"{message}; {prog} --help lists the options") from None
    finally:
        os.environ.pop("COLUMNS", None)
        if before is not None:
            os.environ["COLUMNS"] = before
    return asked()
