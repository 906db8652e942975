"""All figures are drawn again from stored results: modules are found, and published figures stay the same."""

import dataclasses
import importlib
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import matplotlib.text
import numpy as np
import pytest
from matplotlib.figure import Figure

from analyses.linearized_prediction import measures as computed
from analyses.records import RecordError, Result, load_result, write_result
from figures import all as every
from figures import linearized_prediction as drawn
from figures.figure import head, redraw, subject
from figures.methods import draw_one_answer

ROOT = Path(__file__).parent.parent.parent
STORED = ROOT / "docs" / "results"


def test_every_analysis_with_a_stored_figure_has_a_writer_and_each_figure_a_caption():
    stored = {path for path in STORED.rglob("*.png")}
    assert stored
    drawn = {path.stem for path in stored}
    assert drawn <= set(every.captions())
    # A figure that was never stored is of an analysis without a published result.
    assert not [name for name in set(every.captions()) - drawn if any(STORED.glob(f"**/{name}/**/result.json"))]
    analyses = {load_result(folder).analysis for folder in {path.parent for path in stored}}
    assert all(every.writer(name) for name in analyses)
    assert not any(every.writer(name) for name in ("style", "figure", "methods", "all", "nothing", "peft_kernels.map"))


@pytest.mark.parametrize("folder", sorted({path.parent for path in STORED.rglob("*.png")}), ids=lambda p: p.name)
def test_a_figure_is_headed_by_its_model_task_number_of_examples_and_seeds(folder):
    result = load_result(folder)
    words = subject(result)
    assert words.startswith(result.model["name"])
    assert result.dataset["name"] == "none" or result.dataset["name"] in words
    if seeds := result.config.get("seeds"):
        assert words.endswith(f"{len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}")
    for option, unit in (("n_examples", "examples"), ("n_test", "held-out rows"), ("draws", "draws")):
        if count := result.config.get(option):
            assert f"{count:,} {unit}" in words


def test_the_line_above_a_figure_makes_the_page_higher_and_is_wrapped():
    page = Figure(figsize=(3.4, 2.0))
    head(page, "word " * 40)
    lines = page.get_suptitle().splitlines()
    assert len(lines) > 2
    assert max(map(len, lines)) <= 19 * 3.4
    assert page.get_size_inches()[1] == pytest.approx(2.0 + 0.15 * len(lines))


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [({"metric": "accuracy", "chance": 0.51}, [0.51]), ({"metric": "matthews"}, [0.0]), ({"metric": "accuracy"}, [])],
)
def test_the_best_single_answer_is_a_line_where_it_is_known(dataset, expected):
    for vertical in (False, True):
        axes = Figure().subplots()
        draw_one_answer(axes, dataset, vertical=vertical)
        data = [line.get_xdata() if vertical else line.get_ydata() for line in axes.get_lines()]
        assert [list(values) for values in data] == [[value, value] for value in expected]


def test_bars_of_scores_end_at_the_possible_values():
    """Student's interval of three seeds can reach beyond 1; its bar ends there, and lies within the panel."""
    page = drawn.draw(load_result(STORED / "linearized_prediction" / "cola"))
    for panel in page.axes:
        low, high = panel.get_ylim()
        for bars in panel.collections:
            ends = np.concatenate([path.vertices[:, 1] for path in bars.get_paths()])
            assert low <= ends.min()
            assert ends.max() <= min(high, 1.0)


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


NAMES = ("a $\\frac{1}{$ b", "50 $ or $x^$", "$", "line\nbreak $")


@pytest.mark.parametrize(
    "analysis",
    ["parameter_count", "method_comparison/sst2", "spectrum/sst2", "kernel_drift/sst2", "kernel_distance/sst2",
     "peft_kernels/sst2", "convergence", "ablation/degree"],
)  # fmt: skip
def test_names_in_a_result_are_no_formulas(analysis):
    """Whatever a model, a method or a class is called, its name is drawn and not typeset."""
    result = load_result(STORED / analysis)
    names = {row[key] for rows in result.tables.values() for row in rows for key in ("method", "model", "setting")
             if key in row}  # fmt: skip
    longer = dict(zip(sorted(names), NAMES))
    strange = renamed(result, longer)
    strange.dataset["name"] = NAMES[0]
    if strange.dataset.get("label_names"):
        strange.dataset["label_names"] = [*NAMES[:2]]
    module = importlib.import_module(f"figures.{strange.analysis}")
    page = module.draw(strange)
    page.draw_without_rendering()
    written = [text.get_text() for text in page.findobj(matplotlib.text.Text)]
    assert any(r"\$" in text for text in written)


def renamed(value, names):
    """A result with other names of methods and the like, in its tables, metrics, configuration and arrays."""
    if isinstance(value, str):
        parts = value.split(".")
        return ".".join(names.get(part, part) for part in parts) if value not in names else names[value]
    if isinstance(value, dict):
        return {renamed(key, names): renamed(entry, names) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [renamed(entry, names) for entry in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: renamed(getattr(value, f.name), names) for f in dataclasses.fields(value)}
        return type(value)(**fields | ({"analysis": value.analysis} if isinstance(value, Result) else {}))
    return value


def test_a_result_that_lacks_a_table_is_one_line(tmp_path):
    for name in ("parameter_count", "convergence"):
        folder = write_result(replace(load_result(STORED / name), tables={}), tmp_path / name)
        with pytest.raises(RecordError, match=f"cannot draw {folder}: '"):
            redraw(name, importlib.import_module(f"figures.{name}").write, folder)


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
