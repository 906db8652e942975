"""Figures of results: each module draws the results of one analysis. It loads no model and computes no statistic."""
