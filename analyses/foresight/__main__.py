"""The command ``python -m analyses.foresight``."""

from analyses.foresight import ANALYSIS, __doc__

if __name__ == "__main__":
    ANALYSIS.command(__doc__)
