"""The command line ``python -m figures.peft_kernels``."""

from figures import peft_kernels
from figures.figure import command

if __name__ == "__main__":
    command("peft_kernels", peft_kernels.write, peft_kernels.__doc__)
