"""Does the kernel at initialisation predict the outcome of training?

For each training-set size and seed, networks trained by several methods are compared on the same held-out rows with the
predictions of kernels: regression and gradient flow with the method's tangent kernel at initialisation, and regression
with its sign-gradient kernel (for Adam; Malladi et al. 2023). Measured are scores; the share of rows with the same
predicted class, compared with the shares expected by chance and for independent errors; and the correlation of the
logits' changes. The same is measured between the kernels of different methods, and between their networks. For
comparison there are predictions of other kinds (the kernel of the last hidden states, the head alone, the majority
class, the untrained network, permuted labels), and, as the best agreement to expect, a network trained again with
another data order.

    python -m analyses.linearized_prediction --task sst2 --data-dir glue --sizes 32 128 512 --n-test 128 \\
        --comparison results/method_comparison/sst2 --output-dir results/linearized_prediction/sst2

Tasks must have two classes. Kernels are of one output, the difference of the two logits: cross-entropy depends on
nothing else, so that gradient flow on it is exactly that of this output. The head is random; with ``--head
label_words`` a language model answers in label words and has no head to train. The same command resumes an interrupted
run.
"""

from analyses.linearized_prediction.analysis import ANALYSIS, Config, run

COST = "a quarter of an hour"
__all__ = ["ANALYSIS", "Config", "run"]
