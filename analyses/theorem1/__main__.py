"""The command ``python -m analyses.theorem1``."""

from analyses.theorem1 import ANALYSIS, __doc__

if __name__ == "__main__":
    ANALYSIS.command(__doc__)
