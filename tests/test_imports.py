"""Imports go in one direction, without circles: a package imports only packages below it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "analyses.records": set(),
    "ntk": set(),
    "propulsion": set(),
    "figures": {"analyses.records"},
    "analyses": {"analyses.records", "ntk", "propulsion", "figures"},
}
"""Of every room, the others that it may import; each may import itself."""


def modules() -> dict[str, Path]:
    """Every module of the packages, by name."""
    found = {}
    for package in ("analyses", "figures", "ntk", "propulsion"):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def room(name: str) -> str:
    """The room of a module: the longest of the names in `MAY_IMPORT` that it lies in."""
    return max((place for place in MAY_IMPORT if name == place or name.startswith(f"{place}.")), key=len)


def imported(name: str) -> Iterator[str]:
    """The project's modules that a module imports anywhere, in functions too."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, *([base] if base else [])])
            wanted = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for each in wanted:
            while each and each not in MODULES:
                each = each.rpartition(".")[0]
            if each and each != name:
                yield each


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_run_one_way(name):
    allowed = MAY_IMPORT[room(name)] | {room(name)}
    wrong = sorted({each for each in imported(name) if room(each) not in allowed})
    assert not wrong, f"{name} imports {', '.join(wrong)}; {room(name)} may import {', '.join(sorted(allowed))} alone"


def test_there_is_no_circle():
    graph = {name: set(imported(name)) for name in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("reader", ["analyses.records", "figures.all"])
def test_reading_and_drawing_results_loads_no_model_library(reader):
    heavy = ("torch", "peft", "transformers", "datasets", "propulsion", "ntk")
    code = f"import sys, {reader}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
