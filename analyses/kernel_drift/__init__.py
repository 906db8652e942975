"""Do features stay fixed, and networks linear, while they are fine-tuned? This measures the paper's Appendix C.

A network is trained fully, by Propulsion and by LoRA, each time together with its head, from the same pre-trained
weights and head, on the same rows in the same order. Before the first step and after chosen steps, on held-out
examples, these are compared:

- the tangent kernel of the parameters that the method trains in the backbone, with its initial value;
- the Jacobian of the same parameters on a few of the examples, with its initial value, by layer and entry by entry;
- the outputs, with those of the network linearised at its initial parameters in all trained ones, including the head;
- the kernels of the methods, with each other.

Kernels are traced over the outputs. They also change with the head, since every gradient passes through it. Each number
is compared with the same number for a null: permuted examples, another example, or another seed's head.

    python -m analyses.kernel_drift --task sst2 --data-dir glue --n-examples 128 --comparison results/method_comparison

With ``--comparison`` each method has the learning rate that `analyses.method_comparison` chose for it; without it, its
default. The same command resumes an interrupted grid; ``--max-runs 1`` computes one more cell and stops.
"""

from analyses.kernel_drift.analysis import ANALYSIS, Config, run

COST = "ten minutes"
__all__ = ["ANALYSIS", "Config", "run"]
