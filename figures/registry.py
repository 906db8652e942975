"""Every figure module by the analysis whose results it draws, with a caption that says what bars and bands are."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from analyses.records import Result


@dataclass(frozen=True)
class Drawing:
    """How the results of one analysis are drawn.

    Attributes:
        module: Name of the module in `figures`, which is that of the analysis.
        captions: Of every figure, by its file's name without suffix: what it shows, what its bars and bands are.
    """

    module: str
    captions: dict[str, str]

    def write(self, result: Result, folder: Path) -> list[Path]:
        """Draw a result into a folder; return the files."""
        writer: Callable[[Result, Path], list[Path]] = importlib.import_module(f"figures.{self.module}").write
        return writer(result, folder)


CAPTIONS: dict[str, dict[str, str]] = {
    "ablation": {
        "ablation": ("Score by setting: a dot a seed, a bar their mean. No interval is drawn."),
    },
    "complexity": {
        "complexity": (
            "Cost of a forward and backward pass of one layer over that of the frozen layer: multiply-adds by "
            "formula, and time as the median of the timed passes. No interval is drawn."
        ),
    },
    "convergence": {
        "convergence": (
            "Training loss (left) and validation score (right) by step, means over seeds; shades reach from the "
            "lowest seed to the highest."
        ),
    },
    "degree_scale": {
        "degree_scale": (
            "The degree k* at which both kernels have one size. Bars are 95 % bootstrap intervals, over networks "
            "drawn or over examples; the grey band is where the paper's ablation peaks."
        ),
    },
    "delta_weights": {
        "delta_weights": (
            "Left: size and effective rank of every matrix' change, a mark a matrix. Right: histogram of the "
            "trained scales. No interval is drawn."
        ),
    },
    "instruction_tuning": {
        "instruction_tuning": (
            "Left: accuracy by generation of every method, the untuned model in grey; bars are 95 % Wilson intervals "
            "over validation rows, lines the baselines. Right: share of rows that got an answer, without an interval."
        ),
    },
    "johnson_lindenstrauss": {
        "johnson_lindenstrauss": (
            "Left: probability of an error of at least ε over the dimension; lines exact, dashes the bound, dots "
            "drawn. Right: d times the variance. Bars are 99.9 % intervals of the draws."
        ),
    },
    "kernel_distance": {
        "kernel_distance": (
            "Kernel of full fine-tuning, of Propulsion at the best single scale, their absolute difference on one "
            "colour scale, and both spectra; before and after training. Brackets in the headings are 95 % "
            "bootstrap intervals over examples."
        ),
    },
    "kernel_drift": {
        "kernel_drift": (
            "Above: drift of kernel, Jacobian and linearised network over the steps, CKA with the start and with "
            "full fine-tuning, score; means over seeds, bands from the lowest run to the highest. Below: relative "
            "movement of the Jacobian by place and example after training, and entries of a block of it before "
            "training and how far they moved. No interval is drawn there."
        ),
    },
    "linearized_prediction": {
        "linearized_prediction": (
            "Trained networks (solid), regression under their kernels (dashed) and nulls (dotted) by training-set "
            "size: score; agreement of network and kernel beside that of independent errors (thin dotted); "
            "correlation of logits. Bars are 95 % Student intervals over seeds."
        ),
    },
    "memory": {
        "memory": ("Peak memory and time of a step: bars are medians over rounds, dots the rounds."),
    },
    "method_comparison": {
        "method_comparison": (
            "Score of each method beside its trained parameters; bars are 95 % bootstrap intervals over seeds and "
            "validation rows. Propulsion is orange."
        ),
    },
    "parameter_count": {
        "parameter_count": (
            "Parameters that Propulsion trains in each of the paper's models, by choice of layers, and of the "
            "whole model. Counts, without intervals."
        ),
    },
    "peft_kernels": {
        "peft_kernels": (
            "Above: CKA of each method's kernel with that of full fine-tuning; bars are 95 % bootstrap intervals "
            "over examples, a null model's over all of its draws (squares, grey ground). Below: CKA of every two "
            "methods."
        ),
        "peft_kernels_map": (
            "Above: CKA of every two methods' kernels, ordered by their CKA with full fine-tuning. Below: the "
            "methods as points that are near where it is high (classical scaling). Means over seeds; no interval "
            "is drawn."
        ),
        "peft_kernels_layers": (
            "Layer by layer, block by kind: CKA of the layer's two kernels, of its Propulsion kernel with all of "
            "full fine-tuning's, and its shares of both traces. Means over seeds; no interval is drawn."
        ),
    },
    "spectrum": {
        "spectrum": (
            "Decay of eigenvalues, effective dimension, share of the labels in the leading eigenvectors, and "
            "speed of learning, by method; means over seeds, bands from the lowest seed to the highest. The grey "
            "band holds 95 % of permuted labels; dashed is the head's kernel alone."
        ),
    },
    "theorem1": {
        "theorem1": (
            "Left: relative distance of Propulsion's kernel from that of full fine-tuning, by case. Right: of "
            "each position of transformers from its own weights. Means over networks; no interval is drawn."
        ),
    },
    "width_convergence": {
        "width_convergence": (
            "Error of Propulsion's kernel, gap between the kernels with the scatter of single networks (dashed) "
            "and the limit (dotted), and ratio of traces, by width. Root mean squares over networks; no interval "
            "is drawn."
        ),
    },
}
"""By analysis and by the figure's file name without suffix."""
DRAWINGS = {module: Drawing(module, captions) for module, captions in CAPTIONS.items()}
"""By the name of the analysis, which is that of its figure module."""
