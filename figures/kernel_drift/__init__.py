"""Drift along training: the change of kernels, Jacobians and outputs since initialisation, by method.

`lines` shows drifts, alignments and scores over the steps; `jacobian` shows how far the Jacobian has moved after
training, by place, example and entry.
"""

from pathlib import Path

from analyses.records import Result
from figures.kernel_drift import jacobian, lines
from figures.kernel_drift.lines import draw

__all__ = ["draw", "write"]


def write(result: Result, folder: Path | str) -> list[Path]:
    """Draw and write both figures, as PNG and PDF."""
    return [path for module in (lines, jacobian) for path in module.draw.write(result, folder)]
