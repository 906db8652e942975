"""Where Propulsion's kernel departs from full fine-tuning's, layer by layer, and by which of two steps.

A cell shows the CKA of two kernels of one layer. F is the kernel of the weight, M that of a whole matrix on the
outputs, P that of Propulsion's scales. The last map is the control, Propulsion in a random basis of the outputs.
"""

import textwrap

from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from analyses.records import Result
from figures.figure import figure
from figures.layer_map import WRITTEN, lines_of, panel
from figures.style import PAGE_WIDTH

_PANELS = {
    "full_metric": "F and M: what the weight does",
    "metric_scales": "M and P: what the coordinates do",
    "full_scales": "F and P: both",
    "metric_rotated": "M and P in a random basis",
}


@figure("decomposition")
def draw(result: Result) -> Figure:
    """CKA of two kernels of each layer, block by kind: F of the weight, M of a matrix on the outputs, P of Propulsion's
    scales, and P in a random basis. Means over seeds; no interval is drawn.
    """
    rows = [row for row in result.tables["groups"] if row["kind"] is not None]
    lines, kinds = lines_of(rows)
    written = len(lines) <= WRITTEN
    height = 2 * (0.16 * len(lines) + 0.3) + 0.7 if written else 0.16 * len(lines) + 1.3
    page = Figure(figsize=(PAGE_WIDTH, height), layout="constrained")
    grid = page.subplots(*((2, 2) if written else (1, 4)), sharex=True, sharey=True)
    image = None
    for axes, (column, title) in zip(grid.flat, _PANELS.items(), strict=True):
        image = panel(axes, rows, lines, kinds, column, Normalize(0, 1), "{:.2f}".format if written else None)
        axes.set_title(title if written else textwrap.fill(title, 20))
    assert image is not None
    page.colorbar(image, ax=grid, location="bottom", aspect=50, pad=0.02, label="CKA")
    return page


write = draw.write

if __name__ == "__main__":
    draw.command(__doc__)
