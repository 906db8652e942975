"""Pages and tables of the API, made from the modules there are: a new module needs no entry anywhere.

    .. modules:: ntk          a table of a package's modules that are no command, and a page for each
    .. commands:: analyses    the modules that are: how they are called, and their docstring

Modules are read, not imported.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import docstrings
from docutils import nodes
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parents[2]
PACKAGES = ("ntk", "propulsion", "analyses", "figures")
GENERATED = "generated"


@dataclass(frozen=True)
class Module:
    """A module by its dotted name, its docstring, and whether ``python -m`` runs it."""

    name: str
    docstring: str
    is_command: bool


def modules(package: str) -> list[Module]:
    """Modules of a package and its subpackages, by name; those with a leading underscore are left out."""
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name == package or any(part.startswith("_") and part != "__init__" for part in parts):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        command = any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body)
        command |= path.name == "__init__.py" and path.with_name("__main__.py").exists()
        found.append(Module(name, ast.get_docstring(tree) or "", command))
    return found


def has_page(module: Module) -> bool:
    """Commands of analyses and figures are listed with their help; everything else has a page."""
    return not (module.is_command and module.name.split(".")[0] in ("analyses", "figures"))


def page(module: Module) -> str:
    """The page of one module."""
    # A package's names are documented in the modules that define them, which references find by their own name.
    index = "   :no-index:\n" if (ROOT / module.name.replace(".", "/")).is_dir() else ""
    return f"{module.name}\n{'=' * len(module.name)}\n\n.. automodule:: {module.name}\n   :members:\n{index}"


def table(package: str) -> Iterator[str]:
    """One line for each module that has a page, and the pages' place in the site."""
    chosen = [module for module in modules(package) if has_page(module)]
    yield from (".. list-table::", "   :widths: 30 70", "")
    for module in chosen:
        yield f"   * - :doc:`{module.name} <{GENERATED}/{module.name}>`"
        yield f"     - {docstrings.summary(module.docstring)}"
    yield from ("", ".. toctree::", "   :hidden:", "")
    yield from (f"   {GENERATED}/{module.name}" for module in chosen)


def commands(package: str) -> Iterator[str]:
    """A definition list: the command, and the docstring, which is its help text."""
    for module in modules(package):
        if module.is_command:
            yield f"``python -m {module.name}``"
            yield from (f"   {line}".rstrip() for line in docstrings.text(module.docstring))
            yield ""


class _Modules(SphinxDirective):
    required_arguments = 1
    lines = staticmethod(table)

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes("\n".join(type(self).lines(self.arguments[0])))


class _Commands(_Modules):
    lines = staticmethod(commands)


def write_pages(app) -> None:
    """Write the pages beside their tables, and remove those of modules that are gone."""
    folder = Path(app.srcdir) / "api" / GENERATED
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {f"{m.name}.rst": page(m) for package in PACKAGES for m in modules(package) if has_page(m)}
    for old in folder.glob("*.rst"):
        if old.name not in wanted:
            old.unlink()
    for name, text in wanted.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def setup(app) -> dict[str, bool]:
    """Register with Sphinx."""
    app.add_directive("modules", _Modules)
    app.add_directive("commands", _Commands)
    app.connect("builder-inited", write_pages)
    return {"parallel_read_safe": True}
