"""Heat maps and spectra of an adapter's kernel and of that of full fine-tuning, before and after training.

Each row is one stage. Its three heat maps show K_F, the adapter's kernel times its best scale s, and the absolute
difference of the two. They share one colour scale, so that a faint third map means a small difference. Examples are
ordered by label. The scale ends at the 99th percentile of the entries off the diagonal: the diagonal of a kernel is
often several times larger than its other entries, which would then all have the same colour.
"""

import math
import textwrap
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from jaxtyping import Float, Int, Shaped
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from analyses.records import STAGES, Metric, Result
from analyses.records.errors import RecordError, run_command
from figures.command_line import call
from figures.figure import figure, head, redraw
from figures.style import DIVERGING, PAGE_WIDTH, PALETTE, SEQUENTIAL, save

FULL = "full_backbone"
ADAPTER = "propulsion_z"

_HEADINGS = {"initialisation": "At initialisation", "trained": "After training"}
_PERCENTILE = 99.0
# The colours are symmetric about zero if a negative entry differs visibly from zero: a colour map has 256 colours.
_VISIBLE = 1 / 256
_ROW_HEIGHT = 2.65
# Class names are at least this share of a map's height apart, so that they do not overlap.
_MIN_LABEL_GAP = 0.08


@dataclass(frozen=True)
class Row:
    """The content of one row of the figure: two kernels at one stage, with examples in the order of the result."""

    stage: str
    full: Float[np.ndarray, "n n"]
    scaled: Float[np.ndarray, "n n"]
    full_spectrum: Float[np.ndarray, " n_full"]
    scaled_spectrum: Float[np.ndarray, " n_adapter"]
    scale: float


@figure("kernel_distance")
def draw(result: Result, *, full: str = FULL, adapter: str = ADAPTER) -> Figure:
    """Kernel of full fine-tuning, of Propulsion at the best single scale, their absolute difference on one colour
    scale, and both spectra; before and after training. Brackets in the headings are 95 % intervals over seeds, or
    over examples of a single seed.

    Args:
        result: A result of the analysis `kernel_distance`.
        full: Name of the kernel drawn as K_F.
        adapter: Name of the kernel compared with it.

    Raises:
        RecordError: If the result holds no stage with both kernels, or values that are not finite.
    """
    rows = [_row(result, stage, full, adapter) for stage in _stages(result, full, adapter)]
    labels = _array(result, "labels")
    if any(row.full.shape != (labels.size, labels.size) for row in rows):
        raise RecordError(f"the result has {labels.size} labels, but its kernels have another number of examples")
    names = result.dataset.get("label_names")
    if names is not None and not set(labels.tolist()) <= set(range(len(names))):
        raise RecordError(f"the result has labels outside 0 to {len(names) - 1}, the places of its label_names")
    order = np.argsort(labels, kind="stable")
    page = Figure(figsize=(PAGE_WIDTH, _ROW_HEIGHT * len(rows)), layout="constrained")
    head(page, _subject(result, labels.size))
    panels = page.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for panel, row in zip(panels, rows, strict=True):
        _draw_row(panel, row, result, labels, order, (full, adapter))
    return page


def write(result: Result, folder: Path | str, *, full: str = FULL, adapter: str = ADAPTER) -> list[Path]:
    """Draw and write `kernel_distance.png` and `.pdf`; another pair than the default one is part of the names."""
    pair = "" if (full, adapter) == (FULL, ADAPTER) else f".{full}.{adapter}"
    return save(draw(result, full=full, adapter=adapter), folder, f"kernel_distance{pair}")


def color_limits(full: Float[np.ndarray, "n n"], scaled: Float[np.ndarray, "n n"]) -> tuple[float, float]:
    """Return the colour limits of a row: symmetric if negative entries are large enough to be seen, else from zero.

    The upper limit is the 99th percentile of the absolute entries off the diagonal of both kernels together.
    """
    off_diagonal = ~np.eye(len(full), dtype=bool)
    pooled = np.abs(np.concatenate([full[off_diagonal], scaled[off_diagonal]]))
    limit = float(np.percentile(pooled, _PERCENTILE)) if pooled.size else 0.0
    # With one example, or if all entries off the diagonal are zero, the colours cover the diagonal.
    limit = limit or float(max(np.abs(full).max(), np.abs(scaled).max())) or 1.0
    return (-limit if min(full.min(), scaled.min()) < -_VISIBLE * limit else 0.0), limit


def _stages(result: Result, full: str, adapter: str) -> list[str]:
    stages = [s for s in STAGES if {f"{s}.{full}", f"{s}.{adapter}"} <= result.arrays.keys()]
    if not stages:
        kernels = {name.split(".", 1)[1] for name in result.arrays if name.split(".")[0] in STAGES}
        held = ", ".join(sorted(kernels)) or "none"
        raise RecordError(f"the result does not hold {full!r} and {adapter!r} at one stage; kernels in it: {held}")
    return stages


def _row(result: Result, stage: str, full: str, adapter: str) -> Row:
    scale = _best_scale(result, stage, full, adapter)
    return Row(
        stage=stage,
        full=_array(result, f"{stage}.{full}"),
        scaled=scale * _array(result, f"{stage}.{adapter}"),
        full_spectrum=_array(result, f"spectrum.{stage}.{full}"),
        scaled_spectrum=scale * _array(result, f"spectrum.{stage}.{adapter}"),
        scale=scale,
    )


def _best_scale(result: Result, stage: str, full: str, adapter: str) -> float:
    """The best scale of the kernels that are drawn, which are those of one seed; not the mean over seeds."""
    pair = {"stage": stage, "seed": result.seed, "metric": "best_scale", "left": full, "right": adapter}
    for row in result.tables.get("seed_values", ()):
        if pair.items() <= row.items():
            return row["value"]
    return result.metric("best_scale", stage=stage, left=full, right=adapter).value


def _array(result: Result, name: str) -> np.ndarray:
    if name not in result.arrays:
        raise RecordError(f"the result does not hold the array {name!r}, which this figure draws")
    if not np.isfinite(result.arrays[name]).all():
        raise RecordError(f"the array {name!r} of the result holds values that are not finite")
    return result.arrays[name]


def _draw_row(
    panel: SubFigure, row: Row, result: Result, labels: Shaped[np.ndarray, " n"], order: Int[np.ndarray, " n"],
    pair: tuple[str, str],
) -> None:  # fmt: skip
    panel.suptitle(_heading(result, row, pair), x=0.01, ha="left")
    axes = panel.subplots(1, 4)
    symbol = "K_P" if pair[1].startswith("propulsion") else "K_A"
    maps = {
        f"$K_F$\n{_words(pair[0])}": row.full,
        f"$s\\,{symbol}$\n{_words(pair[1])}": row.scaled,
        f"$|K_F - s\\,{symbol}|$\nabsolute difference": np.abs(row.full - row.scaled),
    }
    limits = color_limits(row.full, row.scaled)
    for ax, title in zip(axes, maps):
        ax.set(title=title, xticks=[], yticks=[])
    colors = {"cmap": DIVERGING if limits[0] < 0 else SEQUENTIAL, "vmin": limits[0], "vmax": limits[1]}
    images = [ax.imshow(kernel[np.ix_(order, order)], **colors) for ax, kernel in zip(axes, maps.values())]
    for ax in axes[:3]:
        if (names := result.dataset.get("label_names")) is None:
            _mark_values(ax, labels[order], named=ax is axes[0])
        else:
            # White on the sequential map; on the diverging one white is a value.
            color = "black" if limits[0] < 0 else "white"
            _mark_classes(ax, labels[order], names, color, named=ax is axes[0])
    _draw_color_bar(panel, images, result.find("max_absolute", stage=row.stage, left=pair[0], right=pair[1]))
    _draw_spectra(axes[3], row, symbol)


def _mark_values(ax: Axes, labels: Shaped[np.ndarray, " n"], *, named: bool) -> None:
    """Write the label values of five places along axes ordered by value."""
    places = np.unique(np.linspace(0, labels.size - 1, 5).round().astype(int))
    span = float(labels[-1] - labels[0])
    decimals = max(0, 1 - math.floor(math.log10(span))) if span else 1
    if named:
        ax.set_yticks(places, [f"{labels[place]:.{decimals}f}" for place in places])
        ax.set_ylabel("label")


def _mark_classes(ax: Axes, labels: Shaped[np.ndarray, " n"], names: list[str], color: str, *, named: bool) -> None:
    """Draw the boundaries between classes along ordered axes, and name the classes."""
    classes, starts, counts = np.unique(labels, return_index=True, return_counts=True)
    for start in starts[1:]:
        ax.axhline(start - 0.5, color=color, linewidth=0.5)
        ax.axvline(start - 0.5, color=color, linewidth=0.5)
    if named:
        centres = starts + (counts - 1) / 2
        shown = _far_enough(centres, _MIN_LABEL_GAP * labels.size)
        ax.set_yticks(centres[shown], [names[int(label)] for label in classes[shown]])
        ax.tick_params(axis="y", length=0)


def _far_enough(places: Float[np.ndarray, " k"], gap: float) -> list[int]:
    shown = [0]
    for i in range(1, places.size):
        if places[i] - places[shown[-1]] >= gap:
            shown.append(i)
    return shown


def _draw_color_bar(panel: SubFigure, images: list[AxesImage], difference: Metric | None) -> None:
    low, high = images[0].get_clim()
    drawn = np.concatenate([np.asarray(image.get_array()).ravel() for image in images])
    below, above = bool(drawn.min() < low), bool(drawn.max() > high)
    beyond = "both" if below and above else "min" if below else "max" if above else "neither"
    axes = [image.axes for image in images]
    bar = panel.colorbar(images[0], ax=axes, location="bottom", extend=beyond, aspect=50, pad=0.02, fraction=0.06)
    bar.locator = MaxNLocator(5)
    ticks = ScalarFormatter()
    ticks.set_powerlimits((-2, 4))
    bar.formatter = ticks
    unit = f" [{difference.unit}]" if difference is not None and difference.unit else ""
    cut = "" if beyond == "neither" else f"; colours end at the {_PERCENTILE:.0f}th percentile off the diagonal"
    bar.set_label(f"kernel entry{unit}{cut}")


def _draw_spectra(ax: Axes, row: Row, symbol: str) -> None:
    drawn = {"$K_F$": (row.full_spectrum, "-"), f"$s\\,{symbol}$": (row.scaled_spectrum, "--")}
    for color, (name, (spectrum, dashes)) in zip(PALETTE, drawn.items()):
        index = np.arange(1, spectrum.size + 1)
        # Smaller eigenvalues are rounding errors, by the rule of numpy's matrix rank; a log axis would show only them.
        floor = spectrum.size * np.finfo(spectrum.dtype).eps * np.abs(spectrum).max(initial=0.0)
        kept = spectrum > floor
        ax.plot(index[kept], spectrum[kept], dashes, color=color, label=name)
    # The axes are named in the title, since a label below would move the colour bar away from its maps.
    ax.set(xscale="log", yscale="log", title="eigenvalue\nagainst index")
    ax.set_box_aspect(1)
    ax.legend(loc="lower left", handlelength=1.6)


def _heading(result: Result, row: Row, pair: tuple[str, str]) -> str:
    parts = []
    for words, name in (("relative Frobenius distance {}", "relative_frobenius"),
                        ("{} at best scale", "relative_frobenius_scaled"), ("CKA {}", "cka")):  # fmt: skip
        if metric := result.find(name, stage=row.stage, left=pair[0], right=pair[1]):
            parts.append(words.format(_with_interval(metric)))
    return f"{_HEADINGS[row.stage]}, best scale s = {_number(row.scale)}\n" + "; ".join(parts)


def _with_interval(metric: Metric) -> str:
    if metric.low is None or metric.high is None:
        return _number(metric.value)
    return f"{_number(metric.value)} [{_number(metric.low)}, {_number(metric.high)}]"


def _number(value: float) -> str:
    return f"{value:.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:#.3g}"


def _subject(result: Result, n: int) -> str:
    named = [str(part["name"]) for part in (result.model, result.dataset) if part.get("name")]
    seeds, drawn = len(result.config.get("seeds", ())), f"seed {result.seed}"
    if seeds > 1:
        drawn = f"maps, spectra and s of {drawn}; other numbers are means over {seeds} seeds"
    return ", ".join([*named, f"{n} examples ordered by label", drawn])


def _words(kernel: str) -> str:
    # At 7.5 points, 24 characters are as wide as one map, so that neighbouring titles do not overlap.
    return textwrap.fill(kernel.replace("_", " "), 24)


def main(
    result: tyro.conf.Positional[Path],
    output_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None,
    full: Annotated[str, tyro.conf.arg(metavar="NAME")] = FULL,
    adapter: Annotated[str, tyro.conf.arg(metavar="NAME")] = ADAPTER,
) -> None:
    """Draw the kernels of a kernel_distance result, their difference and their spectra, as PNG and PDF.

    Args:
        result: Result folder, as written by python -m analyses.kernel_distance.
        output_dir: Where to write the figure; the result folder if not given.
        full: Kernel drawn as K_F; an unknown name lists those in the result.
        adapter: Kernel compared with it.
    """
    redraw("kernel_distance", partial(write, full=full, adapter=adapter), result, output_dir)


if __name__ == "__main__":
    run_command(lambda: call(main, prog="python -m figures.kernel_distance"))
