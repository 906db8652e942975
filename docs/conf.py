"""The documentation site. From the root of the repository: python -m sphinx -W --keep-going docs docs/_build/site."""

import re
import sys
from importlib.metadata import version as version_of
from pathlib import Path

# The packages of this checkout, whichever is installed, and the extensions beside this file.
sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent / "_ext")]

project = "propulsion-ntk"
version = release = version_of(project)
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "docstrings", "api"]

# Notebooks are shown as they were executed.
nb_execution_mode = "off"
myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath"]
# Quotation marks are primes in formulas.
smartquotes = False
exclude_patterns = ["_build", "benchmarks/notes.md"]

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
# Attributes of a dataclass as a list: its fields are documented by it, not beside it.
napoleon_use_ivar = True

# Indented text in docstrings is formulas and commands as often as Python.
highlight_language = "none"

html_theme = "furo"
html_title = project
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False

PAGES_OF_ROOT = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Documents of the repository's root, and the pages that include them."""


def at_home_in_docs(markdown: str) -> str:
    """A document of the repository's root with its links as seen from this folder."""

    def link(match: re.Match) -> str:
        target = match[1]
        return f"]({PAGES_OF_ROOT.get(target, target.removeprefix('docs/'))})"

    return re.sub(r"\]\(([^)\s]+)\)", link, markdown)


def include_root(app, docname: str, source: list[str]) -> None:
    """Put documents of the root where a page includes them."""

    def text(match: re.Match) -> str:
        path = Path(app.srcdir).parent / match[1]
        app.env.note_dependency(str(path))
        return at_home_in_docs(path.read_text(encoding="utf-8"))

    source[0] = re.sub(r"^```\{include\} \.\./(\w+\.md)\n```$", text, source[0], flags=re.MULTILINE)


def readable(app, what, name, obj, options, signature, returns) -> tuple[str | None, str | None]:
    """Give the annotation of a kernel its name, which Python does not keep."""
    kernel = "Float[Tensor, '_ _ ...']"
    return signature and signature.replace(kernel, "Kernel"), returns and returns.replace(kernel, "Kernel")


def setup(app) -> None:
    """Register with Sphinx."""
    app.connect("source-read", include_root)
    app.connect("autodoc-process-signature", readable)


# A word after a colon in the text of a default, such as "propulsion:positions=all", is taken for a reference, and
# several configurations have a field of that name.
suppress_warnings = ["ref.python"]
