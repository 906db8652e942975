"""The command."""

from analyses.theorem1 import ANALYSIS, __doc__

ANALYSIS.command(__doc__)
