"""Kernels of methods: their similarity to full fine-tuning and to each other, and the layers where they agree.

`dots` shows the CKA of each method's kernel with that of full fine-tuning; `map` shows the CKA of every two methods
and the methods as points; `layers` shows the agreement layer by layer.
"""

from pathlib import Path

from analyses.records import Result
from figures.peft_kernels import dots, layers, map
from figures.peft_kernels.dots import draw

__all__ = ["draw", "write"]


def write(result: Result, folder: Path | str) -> list[Path]:
    """Draw and write all three figures, as PNG and PDF."""
    return [path for module in (dots, map, layers) for path in module.draw.write(result, folder)]
