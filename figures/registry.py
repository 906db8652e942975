"""Every figure module by the analysis whose results it draws, with a caption that says what bars and bands are."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from analyses.results import Result


@dataclass(frozen=True)
class Drawing:
    """How the results of one analysis are drawn.

    Attributes:
        module: Name of the module in `figures`.
        caption: What its figures show and what their bars and bands are.
    """

    module: str
    caption: str

    def write(self, result: Result, folder: Path) -> list[Path]:
        """Draw a result into a folder; return the files."""
        writer: Callable[[Result, Path], list[Path]] = importlib.import_module(f"figures.{self.module}").write
        return writer(result, folder)


_ALL = (
    Drawing("ablation", "Score by setting: a dot a seed, a bar their mean. No interval is drawn."),
    Drawing("complexity", "Cost of a forward and backward pass of one layer over that of the frozen layer: multiply-adds "
            "by formula, and time as the median of the timed passes. No interval is drawn."),
    Drawing("convergence", "Training loss (left) and validation score (right) by step, means over seeds; shades reach from "
            "the lowest seed to the highest."),
    Drawing("degree_scale", "The degree k* at which both kernels have one size. Bars are 95 % bootstrap intervals, over "
            "networks drawn or over examples; the grey band is where the paper's ablation peaks."),
    Drawing("delta_weights", "Left: size and effective rank of every matrix' change, a mark a matrix. Right: histogram of "
            "the trained scales. No interval is drawn."),
    Drawing("johnson_lindenstrauss", "Left: probability of an error of at least ε over the dimension; lines exact, dashes the "
            "bound, dots drawn. Right: d times the variance. Bars are 99.9 % intervals of the draws."),
    Drawing("kernel_distance", "Kernel of full fine-tuning, of Propulsion at the best single scale, their absolute "
            "difference on one colour scale, and both spectra; before and after training. Brackets in the headings are "
            "95 % bootstrap intervals over examples."),
    Drawing("memory", "Peak memory and time of a step: bars are medians over rounds, dots the rounds."),
    Drawing("method_comparison", "Score of each method beside its trained parameters; bars are 95 % bootstrap intervals "
            "over seeds and validation rows. Propulsion is orange."),
    Drawing("parameter_count", "Parameters that Propulsion trains in each of the paper's models, by choice of layers, and "
            "of the whole model. Counts, without intervals."),
    Drawing("peft_kernels", "Above: CKA of each method's kernel with that of full fine-tuning; bars are 95 % bootstrap "
            "intervals over examples, a null model's over all of its draws (squares, grey ground). Below: CKA of every "
            "two methods."),
    Drawing("theorem1", "Left: relative distance of Propulsion's kernel from that of full fine-tuning, by case. Right: of "
            "each position of transformers from its own weights. Means over networks; no interval is drawn."),
    Drawing("width_convergence", "Error of Propulsion's kernel, gap between the kernels with the scatter of single networks "
            "(dashed) and the limit (dotted), and ratio of traces, by width. Root mean squares over networks; no "
            "interval is drawn."),
)  # fmt: skip
DRAWINGS: dict[str, Drawing] = {drawing.module: drawing for drawing in _ALL}
"""By the name of the analysis, which is that of its figure module."""
