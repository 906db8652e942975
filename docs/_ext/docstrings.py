"""Docstrings as they are written here, to what Sphinx reads.

They are plain text first: formulas stand indented, tables as in Markdown, names of options between single backticks,
and `|S - rho|` is no markup. Sections (Args, Returns, Raises) are napoleon's work, which comes after this.
"""

import inspect
import re
from collections.abc import Iterator
from itertools import pairwise, takewhile

# What stays as it is: ``literals`` and :roles:`of Sphinx`; the name between single backticks becomes a literal.
_KEPT = re.compile(r"(``.+?``|:[\w:]+:`[^`]+`|`[^`]+`)")


def as_rst(lines: list[str]) -> list[str]:
    """The lines of one docstring in reStructuredText."""
    found: list[str] = []
    above, i = "", 0
    while i < len(lines):
        line = lines[i]
        block = _block(lines, i)
        if line.lstrip().startswith(">>>"):
            found += block
        elif line.lstrip().startswith("|") and len(block) > 2:
            found += _table(block)
        elif i and above and not lines[i - 1].strip() and _indent(line) > _indent(above):
            # A section's lines follow its name at once, so this is no section.
            block = _deeper(lines, i, _indent(above))
            found += [" " * _indent(above) + "::", "", *block]
        else:
            block = [line]
            found.append(prose(line))
        i += len(block)
        above = line if line.strip() else above
    return found


def prose(line: str) -> str:
    """One line of text whose stars, bars and trailing underscores mean themselves."""
    parts = _KEPT.split(line)
    for i, part in enumerate(parts):
        if i % 2 == 0:
            parts[i] = re.sub(r"([*|\\]|_(?![A-Za-z0-9]))", r"\\\1", part)
        elif part[0] == "`" and part[1] != "`":
            parts[i] = f"`{part}`"
    return "".join(parts)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _block(lines: list[str], start: int) -> list[str]:
    """The lines from one to the next blank line."""
    return [lines[start], *takewhile(str.strip, lines[start + 1 :])]


def _deeper(lines: list[str], start: int, indent: int) -> list[str]:
    """The lines from one on that are indented further than ``indent``, blank ones between them included."""
    return list(takewhile(lambda line: not line.strip() or _indent(line) > indent, lines[start:]))


def _table(rows: list[str]) -> list[str]:
    """A Markdown table, whose cells may hold bars only where they are not between two spaces."""
    pad = " " * _indent(rows[0])
    found = [f"{pad}.. list-table::", f"{pad}   :header-rows: 1", ""]
    columns = [i for i, c in enumerate(rows[1].strip()) if c == "|"]
    for row in (rows[0], *rows[2:]):
        text = row.strip()
        cells = [text[a + 1 : b].strip() for a, b in pairwise(columns)]
        found += [f"{pad}   {'* -' if i == 0 else '  -'} {prose(cell)}" for i, cell in enumerate(cells)]
    return [*found, ""]


def summary(docstring: str) -> str:
    """The first sentence of a docstring, in reStructuredText."""
    first = " ".join(inspect.cleandoc(docstring).split("\n\n")[0].split())
    return prose(first)


def text(docstring: str) -> Iterator[str]:
    """A whole docstring in reStructuredText, line by line."""
    yield from as_rst(inspect.cleandoc(docstring).splitlines())


def setup(app) -> dict[str, bool]:
    """Register with Sphinx, before napoleon."""

    def convert(app, what, name, obj, options, lines) -> None:
        lines[:] = as_rst(lines)

    app.connect("autodoc-process-docstring", convert, priority=400)
    return {"parallel_read_safe": True}
