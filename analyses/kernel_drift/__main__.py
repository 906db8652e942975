"""The command ``python -m analyses.kernel_drift``."""

from analyses.kernel_drift import ANALYSIS, __doc__

if __name__ == "__main__":
    ANALYSIS.command(__doc__)
