"""Drift along training, from a result folder: how far kernels, Jacobians and outputs leave the start, by method.

Above, lines over the steps, means over the seeds with bands from the lowest run to the highest: drift of the kernel and
of the Jacobian relative to their size at the start, the error of the linearised network relative to the outputs'
movement; CKA of the kernel with the start's and with full fine-tuning's, and the score. Below, one column a method:
relative movement of the Jacobian by place in the network and example, after training, mean over the seeds; and, of the
first run, the entries of a small block of the Jacobian before training, and how far training moved them, both in
units of the root mean square of the former: equal colours are equal sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from analyses.results import Result, load_result
from figures.method_comparison import short
from figures.style import PAGE_WIDTH, PALETTE, SEQUENTIAL, save, style
from propulsion.errors import run_command

_MARKERS = "os^Dv"
# Above this, relative movements have one colour: as large as the start itself.
_FULL = 1.0
_BLOCK_LIMIT = 3.0


def draw(result: Result) -> Figure:
    """Draw lines and heat maps, one page wide."""
    methods = [row["method"] for row in result.tables["methods"]]
    with style():
        figure = Figure(figsize=(PAGE_WIDTH, 7.2), layout="constrained")
        lines, places, blocks = figure.subfigures(3, 1, height_ratios=(3.3, 1.85, 2.0))
        _lines(lines, result, methods)
        _places(places, result, methods)
        _blocks(blocks, result, methods)
        figure.draw_without_rendering()
    return figure


def write(result: Result, folder: Path | str) -> list[Path]:
    """Draw and write `kernel_drift.png` and `.pdf`.

    Raises:
        UserError: The folder cannot be written.
    """
    return save(draw(result), folder, "kernel_drift")


# --- lines ----------------------------------------------------------------------------------------------------------


def _lines(panel: SubFigure, result: Result, methods: list[str]) -> None:
    axes = panel.subplots(2, 3)
    of_method = [
        ("relative_kernel_drift", "$|K_t - K_0|\\,/\\,|K_0|$", "kernel drift"),
        ("relative_jacobian_drift", "$|J_t - J_0|\\,/\\,|J_0|$", "Jacobian drift"),
        ("linearisation_error", "$|f_t - f_t^{lin}|\\,/\\,|f_t - f_0|$", "linearisation error"),
        ("kernel_cka_with_start", "CKA of $K_t$ and $K_0$", "same kernel as at the start?"),
        None,
        ("score", f"{result.dataset['metric']}, validation", "score"),
    ]
    rows, last = result.tables["checkpoints"], int(result.arrays["steps"][-1])
    for ax, entry in zip(axes.flat, of_method):
        for place, method in enumerate(methods):
            if entry is None:
                chosen = [r for r in result.tables["pairs"] if (r["left"], r["right"]) == (methods[0], method)]
                found = [row for row in chosen if row["quantity"] == "cka"]
            else:
                found = [row for row in rows if (row["method"], row["quantity"]) == (method, entry[0])]
            _line(ax, found, place, short(method))
        name, label, title = entry or ("cka", f"CKA with {short(methods[0])}", f"same kernel as {short(methods[0])}?")
        ax.set_title(title, loc="left")
        ax.set_ylabel(label)
        ax.set_xlabel("optimizer step")
        ax.set_xlim(-0.03 * last, 1.03 * last)
        if "cka" in name:
            ax.set_ylim(min(0.0, ax.get_ylim()[0]), 1.03)
        elif name != "score":
            ax.set_ylim(bottom=0)
        ax.grid(color="0.9", linewidth=0.5)
        ax.set_axisbelow(True)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    panel.legend(handles, labels, loc="outside upper center", ncols=len(methods))


def _line(ax: Axes, rows: list[dict[str, Any]], place: int, label: str) -> None:
    rows = [row for row in rows if row["value"] is not None]
    if not rows:
        return
    color = PALETTE[place % len(PALETTE)]
    steps = [row["step"] for row in rows]
    ax.plot(steps, [row["value"] for row in rows], marker=_MARKERS[place % len(_MARKERS)], markersize=3.5, color=color,
            label=label)  # fmt: skip
    runs = np.array([row["by_seed"] for row in rows], dtype=float)
    ax.fill_between(steps, runs.min(axis=1), runs.max(axis=1), color=color, alpha=0.15, linewidth=0)


# --- heat maps ------------------------------------------------------------------------------------------------------


def _places(panel: SubFigure, result: Result, methods: list[str]) -> None:
    axes = panel.subplots(1, len(methods), squeeze=False)[0]
    panel.suptitle("$|J_t - J_0|\\,/\\,|J_0|$ after training, by place in the network and held-out example", x=0.01,
                   ha="left")  # fmt: skip
    images = []
    for ax, row in zip(axes, result.tables["methods"]):
        values = result.arrays[f"jacobian_drift.{row['method']}"]
        images.append(ax.imshow(values, cmap=SEQUENTIAL, vmin=0, vmax=_FULL, aspect="auto"))
        ax.set_yticks(range(len(row["places"])), row["places"])
        ax.set_xticks([])
        ax.set_xlabel(f"{values.shape[1]} examples")
        ax.set_title(short(row["method"]))
    bar = panel.colorbar(images[0], ax=axes, extend="max", fraction=0.03, pad=0.01, ticks=(0, 0.5, 1))
    bar.set_label("1: as large as $J_0$")


def _blocks(panel: SubFigure, result: Result, methods: list[str]) -> None:
    axes = panel.subplots(2, len(methods), squeeze=False)
    panel.suptitle(
        "entries of one small block of the Jacobian (examples down, parameters across): before training, and moved by",
        x=0.01, ha="left",
    )  # fmt: skip
    images = []
    for column, row in zip(axes.T, result.tables["methods"]):
        start, now = (result.arrays[f"{name}.{row['method']}"] for name in ("block_start", "block_now"))
        unit = float(np.sqrt(np.mean(start**2))) or 1.0
        for ax, values, label in zip(column, (start, now - start), ("$|J_0|$", "$|J_t - J_0|$")):
            images.append(ax.imshow(np.abs(values) / unit, cmap=SEQUENTIAL, vmin=0, vmax=_BLOCK_LIMIT, aspect="auto"))
            ax.set_xticks([])
            ax.set_yticks([])
            ax.set_ylabel(label)
        column[0].set_title(short(row["method"]))
        column[1].set_xlabel(_block_name(row["block"]))
    bar = panel.colorbar(images[0], ax=axes, extend="max", fraction=0.03, pad=0.01, ticks=(0, 1, 2, 3))
    bar.set_label("1: root mean\nsquare of $J_0$")


def _block_name(text: str) -> str:
    """Which parameters, short enough for a third of a page; the table of methods has it in full."""
    parameter = text.removeprefix("gradient of the last output by ").partition(", ")[0]
    dull = ("base_model", "model", "default", "attention", "encoder", "weight")
    parts = [part for part in parameter.split(".") if part not in dull]
    return ".".join(parts[-6:])


@dataclass(frozen=True)
class Config:
    """Draw the figure of a result of analyses.kernel_drift again."""

    result: tyro.conf.Positional[Path]
    """Result folder."""
    output_dir: Path | None = None
    """Where to write; by default the result folder."""


def main(config: Config) -> None:
    """Read, draw, write."""
    result = load_result(config.result, analysis="kernel_drift")
    for path in write(result, config.output_dir or config.result):
        print(path)


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Config, prog="python -m figures.kernel_drift", description=__doc__)))
