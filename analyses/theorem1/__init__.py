"""Where does the paper's Theorem 1 hold as written, where does its correction hold, and where do both fail?

The claim is K_F ≈ K_P. Networks with a known infinite-width limit are compared in the limit, K_F from closed forms and
K_P by numerical integration, others at finite width with random weights. The kernel of Propulsion, of degree 1 at
z = 1, is compared with the kernel of full fine-tuning of all parameters (the claim), with that of the weights alone
(the corrected theorem), and with that of all parameters up to the best single factor. A second table compares each
position of a layer in random transformers with the kernel of the position's own weights; `analyses.decomposition` does
so for the layers of pre-trained models.
"""

from analyses.theorem1.analysis import ANALYSIS, Config, run

COST = "half a minute"
__all__ = ["ANALYSIS", "Config", "run"]
