"""The command of a figure module: draw a stored result again, from its folder alone."""

import inspect
from collections.abc import Callable
from pathlib import Path

import tyro

from analyses.results import Result, load_result
from propulsion.errors import run_command

Write = Callable[[Result, Path], list[Path]]


def redraw(analysis: str, write: Write, result: Path, output_dir: Path | None = None) -> None:
    """Draw a result of an analysis; print the files.

    Args:
        analysis: Whose results are drawn.
        write: Draws a result into a folder.
        result: Result folder, or its result.json.
        output_dir: Where to write; the result folder if not given.
    """
    loaded = load_result(result, analysis=analysis)
    for path in write(loaded, output_dir or (result.parent if result.is_file() else result)):
        print(path)


def command(analysis: str, write: Write) -> None:
    """The command line ``python -m figures.ANALYSIS``, described by the module that it is called from."""

    def main(result: tyro.conf.Positional[Path], output_dir: Path | None = None) -> None:
        redraw(analysis, write, result, output_dir)

    caller = inspect.stack()[1].frame.f_globals
    main.__doc__ = f"""{caller["__doc__"].strip()}

    Args:
        result: Result folder, as written by python -m analyses.{analysis}.
        output_dir: Where to write PNG and PDF; the result folder if not given.
    """
    run_command(lambda: tyro.cli(main, prog=f"python -m figures.{analysis}"))
