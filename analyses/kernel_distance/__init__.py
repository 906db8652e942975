"""Does Propulsion's tangent kernel equal full fine-tuning's? The paper's Appendix B, measured.

From the same pre-trained weights and the same random head, one copy is trained fully and one by Propulsion (with its
head). On held-out examples the kernels of both are computed before and after training, compared whole and by layer,
and set beside null models. Kernels are traced over the outputs, in standard parametrisation, in the model's own unit
(squared output per squared parameter).

    python -m analyses.kernel_distance --task sst2 --data-dir DIR --output-dir results/sst2

With ``--seeds 0 1 2`` each seed has its own rows, head, order and null models; numbers are means over seeds, and a
killed run goes on with the seed it was at.
"""

from analyses.kernel_distance.analysis import ANALYSIS, Config, run

COST = "two minutes"
__all__ = ["ANALYSIS", "Config", "run"]
