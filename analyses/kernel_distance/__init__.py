"""Does Propulsion's tangent kernel equal full fine-tuning's? This measures the claim of the paper's Appendix B.

Two copies of a model start from the same pre-trained weights and the same random head. One is trained fully, the other
by Propulsion (with its head). The kernels of both are computed on held-out examples, before and after training,
compared as a whole and by layer, and compared with null models. Kernels are traced over the outputs, in standard
parametrisation, and not normalised (squared output per squared parameter).

    python -m analyses.kernel_distance --task sst2 --data-dir DIR --output-dir results/sst2

With ``--seeds 0 1 2`` each seed has its own rows, head, order and null models, numbers are means over seeds, and the
same command resumes an interrupted run at the first unfinished seed.
"""

from analyses.kernel_distance.analysis import ANALYSIS, Config, run

COST = "two minutes"
__all__ = ["ANALYSIS", "Config", "run"]
