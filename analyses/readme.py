"""Write the tables of published results: every marked block of a README, from the stored result that it names.

    python -m analyses.readme docs/results

A block begins with a line ``<!-- table: FOLDER -->`` and ends with a line ``<!-- end -->``. FOLDER is a result folder,
relative to the README (``.`` is the README's own folder). ``<!-- table: FOLDER, trials -->`` gives the table of the
learning rates that a comparison of methods tried. Result folders that no block names are printed.
"""

import importlib
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

import analyses
from analyses.core.errors import run_command
from analyses.records import RecordError, Result, load_result, result_folders
from analyses.records.atomic import write_texts
from propulsion.command_line import parsed

README = "README.md"
_START, _END = "<!-- table:", "<!-- end -->"
_BLOCK = re.compile(rf"^{_START} ([^\n]+?)(, trials)? -->\n.*?^{_END}$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Config:
    """Options of the command."""

    root: tyro.conf.Positional[Path]
    """Folder that contains READMEs and result folders, at any depth."""


def tables(result: Result, *, trials: bool = False) -> str:
    """The tables of a result in Markdown; with `trials`, the table of the learning rates that a comparison tried.

    Raises:
        RecordError: The result's analysis does not exist, or the result tried no learning rates.
    """
    if result.analysis not in {module.name for module in pkgutil.iter_modules(analyses.__path__)}:
        raise RecordError(f"there is no analysis {result.analysis!r}")
    module = importlib.import_module(f"analyses.{result.analysis}")
    if trials:
        if not result.tables.get("tuning"):
            raise RecordError(f"this result of {result.analysis} tried no learning rates")
        return module.trials(result)
    return module.ANALYSIS.summary(result, markdown=True)


def named(page: Path) -> Iterator[Path]:
    """Yield the result folders that the blocks of a README name."""
    for block in _BLOCK.finditer(page.read_text(encoding="utf-8")):
        yield (page.parent / block[1]).resolve()


def rewritten(page: Path) -> str:
    """The text of a README with its blocks filled from the stored results.

    Raises:
        RecordError: A block has no end, or its result cannot be read.
    """

    def block(found: re.Match[str]) -> str:
        try:
            text = tables(load_result(page.parent / found[1]), trials=bool(found[2]))
        except RecordError as error:
            raise RecordError(f"{page}: {error}") from error
        return f"{_START} {found[1]}{found[2] or ''} -->\n\n{text}\n\n{_END}"

    text = page.read_text(encoding="utf-8")
    if not text.count(_START) == text.count(_END) == len(_BLOCK.findall(text)):
        raise RecordError(f"{page}: every line '{_START} FOLDER -->' needs one line '{_END}' below it")
    return _BLOCK.sub(block, text)


def main(config: Config) -> None:
    """Write the blocks of every README, and print the result folders that no block names.

    Raises:
        RecordError: There is no result, or a block cannot be written.
    """
    results = {folder.resolve() for folder in result_folders(config.root)}
    for page in sorted(config.root.rglob(README)):
        results -= set(named(page))
        text = rewritten(page)
        if text != page.read_text(encoding="utf-8"):
            write_texts(page.parent, {README: text})
            print(f"{page}: written")
    for folder in sorted(results):
        print(f"{folder.relative_to(config.root.resolve())}: in no block")


if __name__ == "__main__":
    run_command(lambda: main(parsed(Config, prog="python -m analyses.readme", description=__doc__)))
