"""How close is the kernel of each parameter-efficient method to that of full fine-tuning?

For one pre-trained model and task, at initialisation and without the head, each method's kernel is compared with that
of the whole backbone: direction, size, leading eigenspaces and alignment with the labels. Null models are compared with
it too. Two further tables show how much of the agreement remains when the mean activation is subtracted from every
linear layer's input (`analyses.peft_kernels.mean_split`), and which layers it comes from
(`analyses.peft_kernels.layers`). Kernels are traced over the outputs, in standard parametrisation.

Each seed draws its own examples, head, random matrices and null models. Numbers are means over seeds; intervals are
Student's over the seeds, on a scale that keeps them in range (`analyses.core.comparison`).

    python -m analyses.peft_kernels --task sst2 --data-dir DIR --seeds 0 1 2 --output-dir results/peft_kernels

The same command resumes an interrupted run at the first unfinished seed. With ``--head label_words`` a causal language
model answers in words instead of through a new head:

    python -m analyses.peft_kernels --task sst2 --data-dir DIR --model FILE.gguf --head label_words
"""

from analyses.peft_kernels.analysis import ANALYSIS, Config, run

COST = "ten minutes"
__all__ = ["ANALYSIS", "Config", "run"]
