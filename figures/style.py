"""The style of all figures (sizes, type and colours), and writing a figure to files.

Figures are drawn at their printed size, one column or one page wide, so that a 7 point letter is 7 points on paper.
They are made without pyplot: no window, no global state, safe to draw inside a long run.
"""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from cycler import cycler
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from analyses.records import RecordError
from analyses.records.atomic import whole

COLUMN_WIDTH = 3.4
"""Width of one column, inches."""
PAGE_WIDTH = 7.0
"""Width of the text on a page, inches."""
PNG_DPI = 300
_RESOLUTION = b"\0\0\0\x09pHYs" + 2 * struct.pack(">I", round(PNG_DPI / 0.0254)) + b"\x01"

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours, distinct under all common kinds of colour blindness; the first two are the most distinct."""
SEQUENTIAL = "viridis"
"""Map for values of one sign: perceptually uniform and readable in grey."""
DIVERGING = "RdBu_r"
"""Map for signed values, white at zero; limits must be symmetric."""

_TICKS = {"major.width": 0.6, "major.size": 2.5, "minor.size": 1.5, "major.pad": 2.0}
_SETTINGS: dict[Any, Any] = {
    # Shipped with matplotlib, so a figure looks the same on every machine.
    "font.family": "DejaVu Sans",
    "mathtext.fontset": "dejavusans",
    # Labels, ticks and legends have this size too.
    "font.size": 7.0,
    "axes.titlesize": 7.5,
    "figure.titlesize": 8.0,
    "axes.linewidth": 0.6,
    "axes.prop_cycle": cycler(color=PALETTE),
    "axes.titlepad": 4.0,
    "axes.labelpad": 2.0,
    **{f"{axis}tick.{name}": size for axis in "xy" for name, size in _TICKS.items()},
    "lines.linewidth": 1.2,
    "legend.frameon": False,
    "figure.dpi": 150,
    # TrueType, since journals refuse the default Type 3 and editors cannot change its text.
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
}


def band_handle(words: str = "lowest to highest seed") -> Patch:
    """An entry of a legend for the shaded bands around lines."""
    return Patch(color="0.5", alpha=0.25, linewidth=0, label=words)


def mark_handle(words: str, marker: str = "o", **look: Any) -> Line2D:
    """An entry of a legend for a mark without a line, grey unless a colour is given."""
    look = {"color": "0.4", "linestyle": "", "markersize": 3.5} | look
    return Line2D([], [], marker=marker, label=words, **look)


def bar_handle(words: str, *, horizontal: bool = False) -> Line2D:
    """An entry of a legend for bars that show intervals."""
    return mark_handle(words, "_" if horizontal else "|", markersize=8)


@contextmanager
def style() -> Iterator[None]:
    """Use the project's style in the block; matplotlib's settings are restored after it."""
    with mpl.rc_context():
        mpl.rcdefaults()  # A user's matplotlibrc must not change a published figure.
        mpl.rcParams.update(_SETTINGS)
        yield


def save(figure: Figure, folder: Path | str, stem: str) -> list[Path]:
    """Write a figure as `STEM.png` and `STEM.pdf`, atomically; the same data give the same bytes.

    Args:
        figure: A figure at its printed size; it is not cropped, so that its type keeps its size.
        folder: Where to write, created if missing.
        stem: File name without suffix.

    Returns:
        The two paths.

    Raises:
        RecordError: If the folder cannot be written, or holds a file of that name that this function did not write.
    """
    # The writers' own dates and version would make every run differ.
    metadata = {"png": {"Software": None}, "pdf": {"CreationDate": None, "ModDate": None}}
    paths = [Path(folder) / f"{stem}.{suffix}" for suffix in metadata]
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        if foreign := [path for path in paths if path.exists() and not _is_saved(path)]:
            raise RecordError(f"will not replace {foreign[0]}, which is no figure of this project; move it away first")
        with style():
            for path, (suffix, entries) in zip(paths, metadata.items(), strict=True):
                # The PDF too: its heat maps are images, rendered at this resolution.
                with whole(path) as partial:
                    figure.savefig(partial, format=suffix, dpi=PNG_DPI, metadata=entries)
    except OSError as error:
        raise RecordError(f"cannot write the figure to {folder}: {error.strerror or error}") from error
    return paths


def _is_saved(path: Path) -> bool:
    """Whether `save` wrote a file, by metadata that matplotlib writes by default and `save` leaves out."""
    content = path.read_bytes()
    if path.suffix == ".pdf":
        return b"(Matplotlib pdf backend v" in content and b"/CreationDate" not in content
    # In a PNG without a text chunk, the chunk of the resolution follows right after the header.
    return content[:8] == b"\x89PNG\r\n\x1a\n" and content[33:50] == _RESOLUTION
