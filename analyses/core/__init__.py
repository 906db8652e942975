"""What all analyses share: their protocol, the cells of grids, intervals, and comparisons of kernels."""
