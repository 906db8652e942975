"""Figures of results: each module draws the results of one analysis. It loads no model and computes no statistic.

`heatmap`, `alignment_matrix` and `spectra` draw kernels in a notebook.
"""

from figures.kernels import alignment_matrix, heatmap, spectra

__all__ = ["alignment_matrix", "heatmap", "spectra"]
