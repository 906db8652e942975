"""Every figure again from stored results alone: the registry is whole, and a published figure comes out the same."""

import ast
import shutil
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from analyses.records import UserError, load_result, write_result
from figures import all as every
from figures.registry import DRAWINGS

ROOT = Path(__file__).parent.parent.parent
STORED = ROOT / "docs" / "results"


def writes(path: Path) -> bool:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return any(isinstance(node, ast.FunctionDef) and node.name == "write" for node in tree.body)


def test_the_registry_names_every_module_that_writes_figures():
    modules = {path.stem for path in (ROOT / "figures").glob("*.py") if writes(path)} - {"registry"}
    assert set(DRAWINGS) == {drawing.module for drawing in DRAWINGS.values()} == modules
    for name in DRAWINGS:
        assert (ROOT / "analyses" / f"{name}.py").exists()


def test_captions_say_what_bars_and_bands_are():
    for drawing in DRAWINGS.values():
        for caption in drawing.captions.values():
            assert any(word in caption.lower() for word in ("interval", "band", "shade", "bars")), caption


def test_a_published_figure_comes_out_the_same(tmp_path):
    shutil.copytree(STORED / "theorem1", tmp_path / "in" / "theorem1")
    every.main(every.Config(tmp_path / "in", tmp_path / "out"))
    drawn, kept = (
        matplotlib.image.imread(f / "theorem1.png") for f in (tmp_path / "out" / "theorem1", STORED / "theorem1")
    )
    np.testing.assert_array_equal(drawn, kept)
    assert (tmp_path / "out" / "theorem1" / "theorem1.pdf").exists()


def test_folders_without_a_figure_module_are_named_and_damaged_ones_too(tmp_path, capsys):
    result = load_result(STORED / "parameter_count")
    write_result(replace(result, analysis="nothing_drawn"), tmp_path / "nothing_drawn")
    write_result(result, tmp_path / "parameter_count")
    every.main(every.Config(tmp_path))
    assert (tmp_path / "parameter_count" / "parameter_count.png").exists()
    assert "nothing_drawn: no figure module for nothing_drawn" in capsys.readouterr().out
    (tmp_path / "nothing_drawn" / "result.json").write_text("{", encoding="utf-8")
    write_result(replace(result, tables={}), tmp_path / "parameter_count", overwrite=True)
    with pytest.raises(SystemExit) as stop:
        every.main(every.Config(tmp_path))
    assert stop.value.code == 1
    errors = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in errors] == ["nothing_drawn", "parameter_count"]
    with pytest.raises(UserError, match="holds no result folder"):
        every.main(every.Config(tmp_path / "parameter_count" / "nowhere"))
