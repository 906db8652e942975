"""The command."""

import tyro

from analyses.core.errors import run_command
from analyses.kernel_distance import Config, __doc__, main

run_command(lambda: main(tyro.cli(Config, prog="python -m analyses.kernel_distance", description=__doc__)))
