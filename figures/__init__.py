"""Figures: each module reads one kind of result and draws it; no model is loaded and no statistic computed."""
