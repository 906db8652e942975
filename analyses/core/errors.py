"""How the command of an analysis reports mistakes of the user."""

from collections.abc import Callable

import analyses.records
import propulsion.errors

MISTAKES = (analyses.records.RecordError, propulsion.errors.UserError)
"""The exceptions for mistakes of the user: that of `analyses.records`, and that of all other packages."""


def run_command(main: Callable[[], None]) -> None:
    """Run a command's main function and report mistakes of the user in one line, as `propulsion.errors` does."""
    propulsion.errors.run_command(main, mistakes=MISTAKES)
