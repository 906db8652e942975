"""Does the kernel predict what training gives? Kernel predictions against networks trained by the same methods.

For each training-set size and seed, on the same held-out rows: what regression and gradient flow under a method's
tangent kernel at initialisation predict, and regression under its sign-gradient kernel (for Adam; Malladi et al. 2023),
against the network that the method really trains. Scores, agreement of the predicted classes beside what chance and
independent errors would give, correlation of the logits with the initial ones subtracted; whether the methods' kernels
regress to the same labels, and whether their networks agree. Nulls: the kernel of last hidden states, the head alone,
the majority class, the untrained network, permuted labels; and, as what could at best be reached, a network trained
again with another data order.

    python -m analyses.linearized_prediction --task sst2 --data-dir glue --sizes 32 128 512 --n-test 128 \\
        --comparison results/method_comparison/sst2 --output-dir results/linearized_prediction/sst2

Tasks of two classes. Kernels are of one output, the difference of the two logits: cross-entropy depends on nothing
else, so that gradient flow on it is exactly that of this output. A head is random, or the label words of a language
model (--head label_words), which has no head to train. A killed run goes on where it was.
"""

from analyses.linearized_prediction.analysis import ANALYSIS, Config, run

COST = "a quarter of an hour"
__all__ = ["ANALYSIS", "Config", "run"]
