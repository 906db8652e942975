"""Theorem 1 of the paper as it is written, as it is right, and where it fails."""

from analyses.theorem1.analysis import ANALYSIS, Config, run

__all__ = ["ANALYSIS", "Config", "run"]
