"""Theorem 1 of the paper as it is written, as it is right, and where it fails: side by side.

The claim is K_F ≈ K_P. Cases with a limit are compared in the limit; the others on finite networks of random weights,
and on a pre-trained encoder. Each kernel of Propulsion, of degree 1 at z = 1, is set against full fine-tuning of all
parameters (the claim), against full fine-tuning of the weights (the corrected theorem), and against the claim up to the
best single scale. A second table does it position by position of transformers, each layer against its own weights.
"""

from analyses.theorem1.analysis import ANALYSIS, Config, run

COST = "ten seconds"
__all__ = ["ANALYSIS", "Config", "run"]
