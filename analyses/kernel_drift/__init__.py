"""Do features stay fixed, and networks linear, while they are fine-tuned? The paper's Appendix C, measured.

From the same pre-trained weights, head, rows and order of rows, a network is trained fully, by Propulsion and by LoRA,
the head always with them. Before the first step and at chosen ones, on held-out examples:

- the tangent kernel of what the method trains in the backbone, against the same at the start;
- the Jacobian of the same parameters on a few of the examples, against the start's, by layer and entry by entry;
- the outputs, against those of the network linearised about the start in all that was trained, head included;
- the kernels of the methods against each other.

Kernels are traced over the outputs. They move with the head as well, which every gradient passes. Beside each number
stands the same number between unrelated things: permuted examples, another example, another seed's head.

    python -m analyses.kernel_drift --task sst2 --data-dir glue --n-examples 128 --comparison results/method_comparison

With ``--comparison`` each method has the learning rate that `analyses.method_comparison` chose for it; without, its
default. A killed grid goes on where it was; ``--max-runs 1`` computes one more cell and stops.
"""

from analyses.kernel_drift.analysis import ANALYSIS, Config, run

COST = "ten minutes"
__all__ = ["ANALYSIS", "Config", "run"]
