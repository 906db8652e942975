"""Agreement of full fine-tuning and Propulsion layer by layer, as heat maps of block and kind of layer.

A cell shows one layer's part of the kernels; a row that spans all kinds is a layer outside of the blocks. Shares of
traces are in per cent, with colours on a logarithmic scale. Numbers are written in the cells of models with few blocks.
"""

import textwrap

from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from analyses.records import Result
from figures.figure import figure
from figures.layer_map import WRITTEN, lines_of, panel
from figures.style import PAGE_WIDTH

_ROW = 0.14
_TALL_ROW = 0.16
"""Inches of a line without numbers."""


@figure("peft_kernels_layers")
def draw(result: Result) -> Figure:
    """Layer by layer, block by kind: CKA of the layer's two kernels, of its Propulsion kernel with all of full
    fine-tuning's, and its shares of both traces. Means over seeds; no interval is drawn.
    """
    rows = result.tables["layers"]
    lines, kinds = lines_of(rows)
    shares = [row[c] for row in rows for c in ("full_share", "propulsion_share") if row[c]]
    close, share = Normalize(0, 1), LogNorm(max(min(shares), 1e-5), 1)
    panels = (
        ("propulsion and full kernel of the layer: CKA", "cka", close, _cka),
        ("propulsion kernel of the layer, whole full kernel: CKA", "propulsion_cka", close, _cka),
        ("share of the whole full kernel's trace, %", "full_share", share, _percent),
        ("share of the whole Propulsion kernel's trace, %", "propulsion_share", share, _percent),
    )
    # Numbers of many blocks would be too small to read: colours alone then, in panels side by side.
    written = len(lines) <= WRITTEN
    height = 2 * (_ROW * len(lines) + 0.22) + 0.6 if written else _TALL_ROW * len(lines) + 1.3
    page = Figure(figsize=(PAGE_WIDTH, height), layout="constrained")
    grid = page.subplots(2, 2, sharex=True, sharey=True) if written else page.subplots(1, 4, sharex=True, sharey=True)
    for axes, (title, column, norm, words) in zip(grid.flat, panels, strict=True):
        image = panel(axes, rows, lines, kinds, column, norm, words if written else None)
        title = title[0].upper() + title[1:]
        axes.set_title(title if written else textwrap.fill(title, 24))
        if not written:
            bar = page.colorbar(image, ax=axes, location="bottom", aspect=12, pad=0.01)
            if norm is share:
                bar.ax.xaxis.set_major_formatter(lambda share, _: f"{100 * share:g}")
            bar.set_label("%" if norm is share else "CKA")
    return page


def _cka(value: float) -> str:
    return f"{value:.2f}"


def _percent(share: float) -> str:
    percent = 100 * share
    if percent < 0.005:
        return "<0.01"
    return f"{percent:.0f}" if percent >= 9.95 else f"{percent:.1f}" if percent >= 0.095 else f"{percent:.2f}"
