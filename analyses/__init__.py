"""Analyses: each module asks one question of a model and its kernels, and writes one result folder."""
