"""The tables in the pages of results agree with the stored results."""

import shutil
from pathlib import Path

import pytest

from analyses import readme
from analyses.core.comparison import directions
from analyses.records import STAGES, RecordError, load_result

STORED = Path(__file__).parent.parent.parent / "docs" / "results"
# Results whose tables are in no page, or only in part.
WITHOUT = {"degree_scale", "spectrum/sst2", "spectrum/rte", "spectrum/cola", "spectrum/stsb"}


@pytest.mark.parametrize("page", sorted(STORED.rglob(readme.README)), ids=lambda page: page.parent.name)
def test_published_tables_are_those_of_the_stored_results(page):
    assert readme.rewritten(page) == page.read_text(encoding="utf-8")


def test_every_stored_result_stands_in_a_block():
    named = {folder for page in STORED.rglob(readme.README) for folder in readme.named(page)}
    stored = {path.parent for path in STORED.rglob("result.json")}
    assert {folder.relative_to(STORED).as_posix() for folder in stored - named} <= WITHOUT
    assert named <= stored


@pytest.fixture
def copied(tmp_path) -> Path:
    shutil.copytree(STORED / "parameter_count", tmp_path / "parameter_count")
    return tmp_path / "parameter_count" / readme.README


def test_a_changed_table_is_written_anew_and_the_rest_stays(copied, capsys):
    published = copied.read_text(encoding="utf-8")
    config = readme.Config(copied.parent.parent)
    readme.main(config)
    assert capsys.readouterr().out == ""
    copied.write_text(published.replace("| RoBERTa-base ", "| RoBERTa-tiny "), encoding="utf-8")
    readme.main(config)
    assert copied.read_text(encoding="utf-8") == published
    assert capsys.readouterr().out == f"{copied}: written\n"
    copied.write_text("# No block\n", encoding="utf-8")
    readme.main(config)
    assert copied.read_text(encoding="utf-8") == "# No block\n"
    assert capsys.readouterr().out == "parameter_count: in no block\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: . -->\n\nno end\n", "needs one line"),
        ("<!-- table: . -->\n<!-- table: . -->\n<!-- end -->\n", "needs one line"),
        ("<!-- table: nowhere -->\n<!-- end -->\n", "not a result folder"),
        ("<!-- table: ., trials -->\n<!-- end -->\n", "tried no learning rates"),
    ],
)
def test_a_block_that_cannot_be_written_is_named(copied, text, message):
    copied.write_text(text, encoding="utf-8")
    with pytest.raises(RecordError, match=message) as error:
        readme.main(readme.Config(copied.parent))
    assert str(copied) in str(error.value)
    assert copied.read_text(encoding="utf-8") == text


def test_a_folder_without_results_is_named(tmp_path):
    with pytest.raises(RecordError, match="holds no result folder"):
        readme.main(readme.Config(tmp_path))


@pytest.mark.parametrize(("task", "outputs"), [("sst2", 2), ("rte", 2), ("cola", 2), ("stsb", 1)])
def test_a_sketch_counts_as_its_number_of_random_directions_for_each_output(task, outputs):
    result = load_result(STORED / "kernel_distance" / task)
    null = next(m for m in result.metrics if m.name == "cka" and m.right == "Gaussian sketch of size 22,272")
    assert null.stage == STAGES[0]
    found = directions(result, f"{null.stage}.{null.left}", null.value)
    assert float(found.replace(",", "")) == pytest.approx(22272 * outputs, rel=0.12)


def test_without_a_cka_or_its_kernel_there_is_no_number_of_random_directions():
    result = load_result(STORED / "kernel_distance" / "sst2")
    kernel = f"{STAGES[0]}.full_backbone"
    assert directions(result, kernel, None) == directions(result, "no such kernel", 0.5) == "-"
    assert directions(result, kernel, 1.0) == directions(result, kernel, float("nan")) == "-"
