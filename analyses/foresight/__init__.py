"""Which measurement, before or early in training, predicts which method trains best, and what is lost by following it?

In every setting, a task, a number of training rows and a seed, all candidates of `analyses.choose` train at their
automatic learning rates and are scored on validation rows. Beside these final scores stands what was known before:
kernels, gradients, numbers of parameters, early losses and scores, the choice of `analyses.choose` within 5 and 15 % of
the steps, and what other tasks say. Each is scored by Spearman's rank correlation with the final scores, and by the
regret of its first choice. Hypotheses, thresholds and the order of what is left out were fixed before the first run, in
docs/results/foresight/plan.md.

    python -m analyses.foresight --data-dir glue --tasks cola library module swapped sst2 rte belongs stsb_classes stsb
        --output-dir results/foresight

The tasks stsb_classes, swapped and belongs are made from GLUE's rows, module and library from docstrings of installed
packages. The same command resumes an interrupted grid; ``--max-runs 10`` computes ten more cells, and with
``--partial`` a result is written from the settings that are complete.
"""

from analyses.foresight.analysis import ANALYSIS, Config, run

COST = "hours"
__all__ = ["ANALYSIS", "Config", "run"]
