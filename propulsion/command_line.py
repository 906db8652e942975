"""The options of a command line: a mistake in them is one line, with a suggestion where a known name is similar."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro

from propulsion.errors import UserError, did_you_mean

C = TypeVar("C")

_WIDTH = "100000"  # Columns in which tyro's longest message is one line.


def parsed(
    config: Callable[..., C], *, prog: str, description: str | None, args: Sequence[str] | None = None, **options: Any
) -> C:
    """Read a configuration from a command line by `tyro.cli`, whose messages about mistakes fill a box of many lines.

    Args:
        config: The dataclass of the configuration.
        prog: The command, as help shows it.
        description: Help about the command.
        args: The words of the command line; by default those of this process.
        options: Further options of `tyro.cli`.

    Raises:
        UserError: An option is unknown, lacks its value, or has one that cannot be used.
    """
    words = sys.argv[1:] if args is None else args
    before, box = os.environ.get("COLUMNS"), io.StringIO()
    if not {"-h", "--help"} & {*words}:  # Help is wrapped to the width of the terminal.
        os.environ["COLUMNS"] = _WIDTH
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(config, prog=prog, description=description, args=words, **options)
    except SystemExit as end:
        if not end.code:
            raise
        raise UserError(f"{_in_one_line(box.getvalue())}; {prog} --help lists the options") from None
    finally:
        os.environ.pop("COLUMNS", None)
        if before is not None:
            os.environ["COLUMNS"] = before


def _in_one_line(box: str) -> str:
    """The message in one of tyro's boxes, without the help that follows it, and with a suggestion."""
    # The frame is of ASCII characters where the terminal has no others.
    lines = [line.strip("│|╭╮╰╯+").strip() for line in box.splitlines()[1:]]
    parts = re.split(r"^[─-]{3,}$", "\n".join(lines), flags=re.MULTILINE)
    message, *others = [part.strip() for part in parts if part.strip()]
    message = " ".join(message.split()).partition(" Got errors:")[0].rstrip(".")
    message = re.sub(r"^Error parsing [A-Z]\w*: ", "", message)
    if choice := re.match(r"invalid choice '(.*)' for argument .*Expected one of \((.*)\)", message):
        return message + did_you_mean(choice[1], re.findall(r"'([^']*)'", choice[2]))
    similar = re.findall(r"^--[\w-]+", "\n".join(part for part in others if "Perhaps you meant" in part), re.MULTILINE)
    return message + (f" (did you mean {' or '.join(similar[:2])}?)" if similar else "")
