"""The kernels of parameter-efficient methods beside full fine-tuning's, on one pre-trained model and task.

At initialisation, the head left out: how close each method's kernel is to that of the whole backbone (direction, size,
top eigenspaces, alignment with the labels), what null models reach, what is left of the agreement once the mean
activation is taken out of every linear layer's input (`analyses.peft_kernels.mean_split`), and which layers carry it
(`analyses.peft_kernels.layers`). Kernels are traced over the outputs, in standard parametrisation.

Each seed draws its own examples, head, random matrices and null models. Numbers are means over seeds; intervals are a
hierarchical bootstrap over seeds and, within each, examples (`analyses.core.intervals.seed_interval`).

    python -m analyses.peft_kernels --task sst2 --data-dir DIR --seeds 0 1 2 --output-dir results/peft_kernels

One cell a seed: a killed run goes on where it was. With ``--head label_words`` a causal language model is asked for a
word instead of given a head:

    python -m analyses.peft_kernels --task sst2 --data-dir DIR --model FILE.gguf --head label_words
"""

from analyses.peft_kernels.analysis import ANALYSIS, Config, run

COST = "ten minutes"
__all__ = ["ANALYSIS", "Config", "run"]
