"""The command."""

import tyro

from analyses.core.errors import run_command
from analyses.peft_kernels import Config, __doc__, main

run_command(lambda: main(tyro.cli(Config, prog="python -m analyses.peft_kernels", description=__doc__)))
