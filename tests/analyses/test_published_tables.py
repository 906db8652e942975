"""The tables in the pages of results agree with the stored results."""

import shutil
from pathlib import Path

import pytest

from analyses import readme
from analyses.records import RecordError

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
