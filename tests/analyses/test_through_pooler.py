"""The note in documents on results that were computed through an untrained pooler, and the commands of such results."""

import dataclasses
from pathlib import Path

import pytest

from analyses.claims import report
from analyses.claims.commands import NOTE, arguments, through_pooler
from analyses.records import RESULT_FILE, load_result

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted((ROOT / "docs" / "results").glob("*/README.md"))


def said(page: Path) -> bool:
    return NOTE in " ".join(page.read_text(encoding="utf-8").replace("\n> ", " ").split())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_a_page_says_so_of_its_results_and_only_then(page):
    results = [load_result(path.parent) for path in page.parent.rglob(RESULT_FILE)]
    assert said(page) == any(map(through_pooler, results))


def test_the_readme_and_the_claims_say_so_as_long_as_a_result_is():
    marked = any(through_pooler(load_result(p.parent)) for p in (ROOT / "docs" / "results").rglob(RESULT_FILE))
    assert said(ROOT / "README.md") == marked
    for name in ("claims.md", "report.html"):
        words = (ROOT / "docs" / "claims" / name).read_text(encoding="utf-8").replace("&#39;", "'")
        assert (NOTE[1:] in words) == marked


def test_it_is_told_by_the_stored_options():
    result = load_result(ROOT / "docs" / "results" / "spectrum" / "sst2")
    assert through_pooler(result)
    assert arguments(result)[-2:] == ["--pooling", "pooler"]
    for pooling in ("mean", "auto"):
        now = dataclasses.replace(result, config=result.config | {"pooling": pooling})
        assert not through_pooler(now)
        assert ("--pooling" in arguments(now)) == (pooling == "mean")
    assert not through_pooler(dataclasses.replace(result, config=result.config | {"model": "roberta-base"}))
    content = report.ledger([], {"spectrum/sst2": now}, "results")
    assert not report.note_in_words(content)
    assert "untrained" not in report.markdown(content, ROOT, ROOT)
