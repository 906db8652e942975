"""The command."""

import tyro

from analyses.core.errors import run_command
from analyses.kernel_drift import Config, __doc__, main

run_command(lambda: main(tyro.cli(Config, prog="python -m analyses.kernel_drift", description=__doc__)))
