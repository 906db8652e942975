"""The command."""

import tyro

from analyses.core.errors import run_command
from analyses.linearized_prediction import Config, __doc__, main

run_command(lambda: main(tyro.cli(Config, prog="python -m analyses.linearized_prediction", description=__doc__)))
