"""The parts of the documentation site; .ci/run builds the site itself."""

import importlib
import sys
from pathlib import Path

import pytest

EXTENSIONS = Path(__file__).parent.parent / "docs" / "_ext"


@pytest.fixture(scope="module")
def docstrings():
    sys.path.insert(0, str(EXTENSIONS))
    yield importlib.import_module("docstrings")
    sys.path.remove(str(EXTENSIONS))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Pr[|S - rho| >= eps], z**k, f_a(x_i), x_", r"Pr[\|S - rho\| >= eps], z\*\*k, f_a(x_i), x\_"),
        ("``a * b`` and :func:`ntk.cka`, `num_labels` * 2", r"``a * b`` and :func:`ntk.cka`, ``num_labels`` \* 2"),
    ],
)
def test_marks_mean_themselves_but_in_literals(docstrings, text, expected):
    assert docstrings.prose(text) == expected


def test_indented_formulas_are_literal_and_sections_are_not(docstrings):
    lines = ["The kernel", "", "    K = J J*", "", "over all.", "", "Args:", "    x: a * b."]
    assert docstrings.as_rst(lines) == [
        "The kernel", "", "::", "", "    K = J J*", "", "over all.", "", "Args:", r"    x: a \* b.",
    ]  # fmt: skip


def test_tables_keep_bars_inside_cells(docstrings):
    table = ["| kind  | D       |", "|-------|---------|", "| ``m`` | mean |D||"]
    assert docstrings.as_rst(table) == [
        ".. list-table::", "   :header-rows: 1", "", "   * - kind", "     - D", "   * - ``m``", r"     - mean \|D\|",
        "",
    ]  # fmt: skip


def test_doctests_stay_as_they_are(docstrings):
    lines = [">>> 2**3", "8"]
    assert docstrings.as_rst(lines) == lines
