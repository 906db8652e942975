"""The note in docs/note: its numbers and figures are those of stored results, its references exist, and it builds."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from analyses.decomposition import ALL
from analyses.records import load_result

NOTE = Path(__file__).parent.parent / "docs" / "note"
TEXT = (NOTE / "note.tex").read_text(encoding="utf-8")


def test_the_table_is_that_of_the_decomposition():
    result = load_result(NOTE.parent / "results" / "decomposition", analysis="decomposition")
    stored = {row["group"]: row for row in result.tables["groups"]}
    rows = [line.removesuffix(" \\\\").split(" & ") for line in TEXT.splitlines() if re.match(r"[\w ]+ & 0\.", line)]
    assert len(rows) == 7
    columns = ("full_metric", "metric_scales", "full_scales", "metric_rotated")
    for kind, *numbers in rows:
        assert numbers == [f"{stored[kind][column]:.3f}" for column in columns], kind
    assert f"is {stored[ALL]['metric_rotated']:.3f} in place of {stored[ALL]['metric_scales']:.3f}" in TEXT
    assert (result.config["n_examples"], len(result.config["seeds"])) == (128, 3)


def test_figures_labels_and_sources_exist():
    paths = re.findall(r"\{(\.\./results/[\w/]+/)\}", TEXT)
    for figure in re.findall(r"\\includegraphics\[.*?\]\{(\w+)\}", TEXT):
        assert any((NOTE / path / f"{figure}.pdf").exists() for path in paths), figure
    assert set(re.findall(r"\\ref\{(\w+)\}", TEXT)) <= set(re.findall(r"\\label\{(\w+)\}", TEXT))
    assert set(re.findall(r"\\cite\{(\w+)\}", TEXT)) == set(re.findall(r"\\bibitem\{(\w+)\}", TEXT))


def test_environments_are_closed():
    opened = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", TEXT):
        if kind == "begin":
            opened.append(name)
        else:
            assert opened.pop() == name
    assert not opened


@pytest.mark.skipif(shutil.which("latexmk") is None, reason="LaTeX is not installed")
def test_it_builds_as_four_pages(tmp_path):
    folder = tmp_path / "docs" / "note"
    shutil.copytree(NOTE, folder, ignore=shutil.ignore_patterns("build"))
    (folder.parent / "results").symlink_to(NOTE.parent / "results")
    done = subprocess.run(["latexmk", "note.tex"], cwd=folder, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout[-2000:]
    log = (folder / "build" / "note.log").read_text(errors="replace")
    assert re.search(r"Output written on \S*note\.pdf \(4 pages", log.replace("\n", ""))
    assert "undefined" not in log
