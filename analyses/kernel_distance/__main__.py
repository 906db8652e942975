"""The command ``python -m analyses.kernel_distance``."""

from analyses.kernel_distance import ANALYSIS, __doc__

if __name__ == "__main__":
    ANALYSIS.command(__doc__)
