"""The command ``python -m analyses.linearized_prediction``."""

from analyses.linearized_prediction import ANALYSIS, __doc__

if __name__ == "__main__":
    ANALYSIS.command(__doc__)
