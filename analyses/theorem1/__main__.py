"""The command."""

from analyses.theorem1 import ANALYSIS, __doc__

if __name__ == "__main__":
    ANALYSIS.command(__doc__)
