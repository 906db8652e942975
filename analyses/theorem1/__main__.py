"""The command ``python -m analyses.theorem1``."""

from analyses.theorem1 import analysis

if __name__ == "__main__":
    analysis.ANALYSIS.command(analysis.__doc__)
