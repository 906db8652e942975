"""All figures are drawn again from stored results: modules are found, and published figures stay the same."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from analyses.linearized_prediction import measures as computed
from analyses.records import RecordError, load_result, write_result
from figures import all as every
from figures import linearized_prediction as drawn

ROOT = Path(__file__).parent.parent.parent
STORED = ROOT / "docs" / "results"


def test_every_analysis_with_a_stored_figure_has_a_writer_and_each_figure_a_caption():
    stored = {path for path in STORED.rglob("*.png")}
    assert stored
    assert {path.stem for path in stored} == set(every.captions())
    analyses = {load_result(folder).analysis for folder in {path.parent for path in stored}}
    assert all(every.writer(name) for name in analyses)
    assert not any(every.writer(name) for name in ("style", "figure", "methods", "all", "nothing", "peft_kernels.map"))


def test_captions_say_what_bars_and_bands_are():
    for caption in every.captions().values():
        assert any(word in caption.lower() for word in ("interval", "band", "shade", "bars")), caption


def test_figures_load_records_alone():
    """Drawing a figure imports no model library, no analysis and no code that computes kernels."""
    script = (
        "import sys, figures.all; figures.all.captions(); "
        "print(*{'.'.join(name.split('.')[:2]) for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    loaded = set(done.stdout.split())
    assert "figures.spectrum" in loaded
    assert not {"torch", "peft", "transformers", "ntk", "propulsion"} & loaded
    assert {name for name in loaded if name.startswith("analyses")} == {"analyses", "analyses.records"}


def test_names_of_predictors_are_those_of_the_analysis():
    names = ("REGRESSION", "SIGN", "AGAIN")
    assert [getattr(drawn, name) for name in names] == [getattr(computed, name) for name in names]


def test_a_file_of_somebody_else_is_not_replaced(tmp_path):
    result = load_result(STORED / "parameter_count")
    write = every.writer("parameter_count")
    assert write is not None
    files = write(result, tmp_path)
    first = [path.read_bytes() for path in files]
    assert [path.read_bytes() for path in write(result, tmp_path)] == first
    for path in files:
        kept = path.read_bytes()
        for content in (b"", b"notes", _other(path.suffix, tmp_path)):
            path.write_bytes(content)
            with pytest.raises(RecordError, match=f"will not replace {path}"):
                write(result, tmp_path)
            assert path.read_bytes() == content
        path.write_bytes(kept)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in files}


def _other(suffix: str, folder: Path) -> bytes:
    """A plot by matplotlib that this project did not write."""
    path = folder / f"other{suffix}"
    Figure().savefig(path, dpi=300)
    content = path.read_bytes()
    path.unlink()
    return content


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
    with pytest.raises(RecordError, match="holds no result folder"):
        every.main(every.Config(tmp_path / "parameter_count" / "nowhere"))
