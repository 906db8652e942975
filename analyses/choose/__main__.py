"""The command ``python -m analyses.choose``."""

from analyses.choose import ANALYSIS, __doc__

if __name__ == "__main__":
    ANALYSIS.command(__doc__)
