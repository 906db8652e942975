"""A user's mistakes in the command of an analysis, whichever package found them."""

from collections.abc import Callable

import analyses.records
import propulsion.errors

MISTAKES = (analyses.records.RecordError, propulsion.errors.UserError)
"""What is raised for a mistake of the user, by the ground floor of the analyses and by all above it."""


def run_command(main: Callable[[], None]) -> None:
    """Run a command's main function, turning the user's mistakes into one line; see `propulsion.errors`."""
    propulsion.errors.run_command(main, mistakes=MISTAKES)
