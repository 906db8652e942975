"""Rows made from docstrings of installed Python packages: the first sentence, and where it stands.

Sources are parsed and not imported. The rows depend on the installed versions; their fingerprint says which they are.
"""

import ast
import hashlib
import importlib.util
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from propulsion.errors import UserError

LIBRARIES: Mapping[str, tuple[str, ...]] = {
    "numpy": ("numpy", "np"),
    "scipy": ("scipy", "sp"),
    "scikit-learn": ("sklearn", "scikit", "learn"),
    "matplotlib": ("matplotlib", "mpl", "pyplot", "plt"),
}
"""By label of the task "library", the package's name and other words for it, which are removed from its rows."""
MODULES: Mapping[str, tuple[str, ...]] = {
    "network": ("http", "urllib", "socket", "socketserver", "ssl", "ftplib", "smtplib", "poplib", "imaplib", "xmlrpc",
                "wsgiref", "ipaddress", "email", "mailbox"),
    "interface": ("tkinter", "turtle", "optparse", "argparse", "cmd", "curses", "getpass", "webbrowser"),
    "concurrency": ("asyncio", "threading", "multiprocessing", "concurrent", "queue", "subprocess", "selectors",
                    "sched"),
    "numbers": ("_pydecimal", "fractions", "numbers", "statistics", "random", "datetime", "_pydatetime", "calendar"),
    "development": ("unittest", "doctest", "pdb", "bdb", "inspect", "pydoc", "traceback", "ast", "dis", "trace",
                    "pickletools", "symtable", "importlib", "pkgutil", "typing"),
}  # fmt: skip
"""By label of the task "module", the modules and packages of Python's standard library that it covers."""
HELD_OUT = 0.25
"""Largest share of the rows of a label that is held out."""
_WORDS = range(4, 61)
"""Numbers of words that a sentence may have."""


@dataclass(frozen=True)
class Sentence:
    """A row.

    Attributes:
        text: The first sentence of a docstring, without words that name its label.
        label: The index of its label.
        source: The file that it is from, relative to the folder of the packages.
    """

    text: str
    label: int
    source: str


def library_sentences() -> list[Sentence]:
    """The rows of the task "library".

    Raises:
        UserError: One of the packages is not installed.
    """
    found = []
    for label, words in enumerate(LIBRARIES.values()):
        spec = importlib.util.find_spec(words[0])
        if spec is None or spec.origin is None:
            raise UserError(f"the task library is made from installed packages, and {words[0]} is not installed")
        root = Path(spec.origin).parent
        found += [one for path in sorted(root.rglob("*.py")) for one in sentences(path, root.parent, label, words)]
    return distinct(found)


def module_sentences() -> list[Sentence]:
    """The rows of the task "module"."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for label, modules in enumerate(MODULES.values()):
        for module in modules:
            package = root / module
            paths = sorted(package.rglob("*.py")) if package.is_dir() else [package.with_suffix(".py")]
            for path in filter(Path.is_file, paths):
                names = path.relative_to(root).with_suffix("").parts
                words = [name.strip("_").removeprefix("py") for name in names if name != "__init__"]
                found += sentences(path, root, label, [*words, *names])
    return distinct(found)


def sentences(path: Path, root: Path, label: int, words: Sequence[str]) -> Iterator[Sentence]:
    """The first sentences of the docstrings in a file, without some words; none of a file of tests."""
    source = path.relative_to(root)
    if {"test", "tests", "idle_test"} & {*source.parts}:
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and (docstring := ast.get_docstring(node)):
            text = without(first_sentence(docstring), words)
            if len(text.split()) in _WORDS:
                yield Sentence(text, label, source.as_posix())


def first_sentence(docstring: str) -> str:
    """The first paragraph up to the end of its first sentence, on one line.

    >>> first_sentence("Sum of the values, e.g. of an array.  Not a mean.\\n\\nMore.")
    'Sum of the values, e.g. of an array.'
    """
    paragraph = " ".join(re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0].split())
    return re.split(r"(?<=[.?!])(?<!e\.g\.)(?<!i\.e\.)\s+(?=[A-Z])", paragraph, maxsplit=1)[0]


def without(text: str, words: Sequence[str]) -> str:
    """The text without some words, in whichever case, alone or as parts of a dotted or underscored name.

    >>> without("Return a NumPy array (np.ndarray).", ("numpy", "np"))
    'Return a array (.ndarray).'
    """
    names = "|".join(sorted({re.escape(word) for word in words if word}, key=len, reverse=True))
    return " ".join(re.sub(rf"(?<![A-Za-z0-9])(?:{names})(?![A-Za-z0-9])", "", text, flags=re.IGNORECASE).split())


def distinct(rows: Sequence[Sentence]) -> list[Sentence]:
    """The rows whose text occurs once, as many of each label as of the rarest, chosen by a hash of their text."""
    counts = Counter(row.text.casefold() for row in rows)
    once = sorted((row for row in rows if counts[row.text.casefold()] == 1), key=lambda row: digest(row.text))
    labels = {row.label for row in once}
    fewest = min((sum(row.label == label for row in once) for label in labels), default=0)
    return [row for label in sorted(labels) for row in [r for r in once if r.label == label][:fewest]]


def digest(text: str) -> str:
    """A hash of a text, by which rows are chosen and divided in the same way on every machine."""
    return hashlib.sha256(text.encode()).hexdigest()


def held_out_sources(rows: Sequence[Sentence]) -> set[str]:
    """The files whose rows are held out, so that no file is on both sides: up to a quarter of the rows of each label.

    Of each label, files are taken in the order of a hash of their names, and left out where they would exceed that.
    """
    chosen: set[str] = set()
    for label in {row.label for row in rows}:
        counts = Counter(row.source for row in rows if row.label == label)
        room = HELD_OUT * counts.total()
        for source in sorted(counts, key=digest):
            if counts[source] <= room:
                chosen.add(source)
                room -= counts[source]
    return chosen
