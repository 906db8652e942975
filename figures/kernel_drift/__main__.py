"""The command line ``python -m figures.kernel_drift``."""

from figures import kernel_drift
from figures.figure import command

if __name__ == "__main__":
    command("kernel_drift", kernel_drift.write, kernel_drift.__doc__)
