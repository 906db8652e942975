"""The command ``python -m analyses.peft_kernels``."""

from analyses.peft_kernels import ANALYSIS, __doc__

if __name__ == "__main__":
    ANALYSIS.command(__doc__)
