"""How the command of every analysis ends: print the tables, write the result folder, draw the figures."""

import importlib
from collections.abc import Callable
from pathlib import Path

from analyses.records import Result, check_writable, write_result


def publish(
    compute: Callable[[], Result | None], folder: Path, *, summary: Callable[[Result], str], overwrite: bool, about: str
) -> None:
    """Compute a result, unless its folder could not be written; print it, write it, draw the figures of its analysis.

    Args:
        compute: Returns the result, or None where cells of a grid are missing, of which it has spoken.
        folder: The result folder.
        summary: The result's tables as text.
        overwrite: Replace an earlier result in the folder.
        about: What the numbers' intervals or units are, in words; the last line printed begins with it.

    Raises:
        UserError: The folder cannot be written or holds a result; what `compute` raises.
    """
    check_writable(folder, overwrite=overwrite)
    result = compute()
    if result is None:
        return
    print(f"\n{summary(result)}\n")
    # Figures read results, and analyses know nothing of them but that each has a module of its name.
    draw = importlib.import_module(f"figures.{result.analysis}").write
    written = write_result(result, folder, figures=draw, overwrite=overwrite)
    print(f"{about}{'; ' if about else ''}result and figures in {written}")
