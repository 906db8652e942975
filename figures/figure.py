"""The decorator `figure`, which turns a function that draws a result, with its caption as docstring, into a `Drawing`.

    @figure("memory")
    def draw(result: Result) -> Figure:
        '''Peak memory and time of a step: bars are medians over rounds, dots the rounds.'''

    write = draw.write

    if __name__ == "__main__":
        draw.command(__doc__)

A `Drawing` writes the files and provides the command that redraws a stored result. Above every figure stands one grey
line with the model, the task, the number of examples and the seeds of the result.
"""

import dataclasses
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from matplotlib.figure import Figure

from analyses.records import Metric, RecordError, Result, load_result
from analyses.records.errors import one_line, run_command
from figures.command_line import call
from figures.style import save, style

Write = Callable[[Result, Path], list[Path]]
_LINE = 0.15
"""Inches of a line above the figure."""
_LETTERS = 19
"""Letters of that line on an inch."""
_COUNTS = {
    "n_examples": "{} examples", "n_test": "{} held-out rows", "n_train": "{} training rows",
    "n_validation": "up to {} validation rows", "max_train_samples": "{} training rows",
    "max_eval_samples": "{} validation rows", "tokens": "{} tokens", "draws": "{} draws",
}  # fmt: skip
"""Options that give a number of examples, and how it is written. A task can have fewer validation rows than asked."""
UNDRAWABLE = (LookupError, StopIteration, TypeError, ValueError)
"""What drawing raises if a result lacks a table, an array or a value, or has one of another form."""


@dataclass(frozen=True)
class Drawing:
    """One figure of the results of one analysis.

    Attributes:
        stem: Name of its files without suffix.
        caption: What the figure shows, and the meaning of its bars and bands.
        function: Draws a result.
        settled: Whether the layout is computed once before the figure is written. It is computed again in writing, and
            its second pass may differ from the first.
    """

    stem: str
    caption: str
    function: Callable[..., Figure]
    settled: bool = True

    def __call__(self, result: Result, **options: Any) -> Figure:
        """Draw a result in the project's style.

        Raises:
            RecordError: The result lacks something that the figure shows.
        """
        with style():
            shown = without_formulas(result)
            drawn = self.function(shown, **options)
            if not drawn.get_suptitle():
                head(drawn, subject(shown))
            if self.settled:
                drawn.draw_without_rendering()
        return drawn

    def write(self, result: Result, folder: Path | str, **options: Any) -> list[Path]:
        """Draw a result, and write it into a folder as PNG and PDF; return the two paths.

        Raises:
            RecordError: As `__call__` and `save` do.
        """
        return save(self(result, **options), folder, self.stem)

    def command(self, description: str | None) -> None:
        """The command line of a module with a single figure, which has the name of its analysis."""
        command(self.stem, self.write, description)


def head(page: Figure, words: str) -> None:
    """Write words above a figure, which becomes higher by their lines."""
    width, height = page.get_size_inches()
    lines = textwrap.wrap(words, int(_LETTERS * width))
    page.set_size_inches(width, height + _LINE * len(lines))
    page.suptitle("\n".join(lines), x=0.01, ha="left", color="0.35", fontsize=7)


def subject(result: Result) -> str:
    """Model, task, number of examples and seeds of a result, in words."""
    names = [part.get("name") for part in (result.model, result.dataset)]
    options = dict(_leaves(result.config))
    counts = [words.format(f"{options[name]:,}") for name, words in _COUNTS.items() if options.get(name)]
    seeds = result.config.get("seeds") or [result.seed]
    drawn = f"{len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}"
    return ", ".join([*(name for name in names if name and name != "none"), *counts, *[drawn] * ("seed" in options)])


def _leaves(options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The options of a configuration, and of those in its fields, by name; `seed` for `seeds` too."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _leaves(value)
        else:
            yield ("seed" if name == "seeds" else name), value


def without_formulas(result: Result) -> Result:
    """A result whose texts are drawn as they are: matplotlib would typeset what stands between two dollar signs."""
    fields = {field.name: _escaped(getattr(result, field.name)) for field in dataclasses.fields(result)}
    return dataclasses.replace(result, **fields)


def _escaped(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("$", r"\$")
    if isinstance(value, dict):
        return {_escaped(key): _escaped(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_escaped(entry) for entry in value]
    if isinstance(value, Metric):
        return Metric(**_escaped(vars(value)))
    return value


def figure(stem: str, *, settled: bool = True) -> Callable[[Callable[..., Figure]], Drawing]:
    """Turn a function that draws a result into a `Drawing`, with the first paragraph of its docstring as the caption.

    Args:
        stem: Name of the figure's files without suffix; for an analysis with one figure, the name of the analysis.
        settled: See `Drawing`.
    """

    def decorate(function: Callable[..., Figure]) -> Drawing:
        caption = (inspect.getdoc(function) or "").partition("\n\n")[0]
        return Drawing(stem, " ".join(caption.split()), function, settled)

    return decorate


def redraw(analysis: str, write: Write, result: Path, output_dir: Path | None = None) -> None:
    """Draw a stored result of an analysis into a folder, by default its own, and print the names of the files.

    Raises:
        RecordError: The result is absent, damaged, of another analysis, or lacks something that the figure shows; or
            the folder cannot be written.
    """
    loaded = load_result(result, analysis=analysis)
    try:
        paths = write(loaded, output_dir or (result.parent if result.is_file() else result))
    except UNDRAWABLE as error:
        raise RecordError(f"cannot draw {result}: {one_line(error)}") from error
    for path in paths:
        print(path)


def command(analysis: str, write: Write, description: str | None) -> None:
    """The command line ``python -m figures.ANALYSIS``, with the docstring of the module as its help."""

    def main(result: tyro.conf.Positional[Path], output_dir: Path | None = None) -> None:
        """Redraw a stored result.

        Args:
            result: Result folder, as written by the analysis.
            output_dir: Where to write PNG and PDF; the result folder if not given.
        """
        redraw(analysis, write, result, output_dir)

    run_command(lambda: call(main, prog=f"python -m figures.{analysis}", description=description))
