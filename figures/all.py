"""Redraw every figure of every result folder below a folder, from the stored results alone.

    python -m figures.all docs/results

Figures are written into their result folders, or into the same tree below --output-dir. A result whose analysis has no
figure is reported and skipped. A result that cannot be read or drawn is reported as well, and the exit code is then 1.
"""

import importlib
import pkgutil
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

import figures
from analyses.records import load_result, result_folders
from analyses.records.errors import one_line, run_command
from figures.command_line import call
from figures.figure import UNDRAWABLE, Drawing, Write


@dataclass(frozen=True)
class Config:
    """Options of the command."""

    root: tyro.conf.Positional[Path]
    """Folder with result folders, at any depth."""
    output_dir: Path | None = None
    """Write the figures into the same tree below this folder; by default beside their results."""


def writer(analysis: str) -> Write | None:
    """The function that draws results of an analysis into a folder: `write` of `figures.ANALYSIS`; None without it."""
    if analysis not in {module.name for module in pkgutil.iter_modules(figures.__path__)}:
        return None
    return getattr(importlib.import_module(f"figures.{analysis}"), "write", None)


def captions() -> dict[str, str]:
    """The caption of every figure, by the name of the figure's file without suffix."""
    names = [module.name for module in pkgutil.walk_packages(figures.__path__, "figures.")]
    modules = [importlib.import_module(name) for name in names if not name.endswith(("__main__", ".all"))]
    drawings = [found for module in modules if isinstance(found := getattr(module, "draw", None), Drawing)]
    return {drawing.stem: drawing.caption for drawing in drawings}


def main(config: Config) -> None:
    """Redraw the figures folder by folder; exit with code 1 if one could not be drawn."""
    failed = False
    for folder in result_folders(config.root):
        name = folder.relative_to(config.root)
        try:
            result = load_result(folder)
            write = writer(result.analysis)
            if write is None:
                print(f"{name}: no figure module for {result.analysis}")
                continue
            target = folder if config.output_dir is None else config.output_dir / name
            print(f"{name}: {', '.join(path.name for path in write(result, target))}")
        except UNDRAWABLE as error:
            failed = True
            print(f"{name}: {one_line(error)}", file=sys.stderr)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    run_command(lambda: main(call(Config, prog="python -m figures.all", description=__doc__)))
