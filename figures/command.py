"""The command of a figure module: draw a stored result again, from its folder alone."""

from collections.abc import Callable
from pathlib import Path

import tyro

from analyses.records import Result, load_result
from analyses.records.errors import run_command

Write = Callable[[Result, Path], list[Path]]


def redraw(analysis: str, write: Write, result: Path, output_dir: Path | None = None) -> None:
    """Draw a result of an analysis; print the files.

    Args:
        analysis: Whose results are drawn.
        write: Draws a result into a folder.
        result: Result folder, or its result.json.
        output_dir: Where to write; the result folder if not given.

    Raises:
        UserError: The result is absent, damaged, of another analysis or lacks what is drawn; nowhere to write.
    """
    loaded = load_result(result, analysis=analysis)
    for path in write(loaded, output_dir or (result.parent if result.is_file() else result)):
        print(path)


def command(analysis: str, write: Write, description: str | None) -> None:
    """The command line ``python -m figures.ANALYSIS``.

    Args:
        analysis: Whose results are drawn, and the name of the figure's module.
        write: Draws a result into a folder.
        description: The module's docstring, for the help.
    """

    def main(result: tyro.conf.Positional[Path], output_dir: Path | None = None) -> None:
        """Draw again.

        Args:
            result: Result folder, as written by the analysis.
            output_dir: Where to write PNG and PDF; the result folder if not given.
        """
        redraw(analysis, write, result, output_dir)

    run_command(lambda: tyro.cli(main, prog=f"python -m figures.{analysis}", description=description))
