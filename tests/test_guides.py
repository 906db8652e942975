"""The guides' code runs: the blocks of a page in order, in one namespace, with the packaged encoder.

Tiny random models replace those from the hub.
"""

import re
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from ntk.infinite import ACTIVATIONS
from ntk.structured.rules import RULES
from propulsion import pretrained
from propulsion.data.tasks import TASKS

GUIDES = sorted((Path(__file__).parent.parent / "docs" / "guides").glob("*.md"))


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def no_hub(monkeypatch, tiny_models):
    """Replace models of the hub by tiny ones."""
    load = pretrained.load_model

    def load_model(model=None, *, task_type, **options):
        return load(model and tiny_models[task_type], task_type=task_type, **options)

    monkeypatch.setattr(pretrained, "load_model", load_model)


@pytest.fixture(autouse=True)
def tables():
    """A guide may add entries to tables; they are removed afterwards, so that other tests do not see them."""
    with ExitStack() as stack:
        for table in (RULES, ACTIVATIONS, TASKS):
            stack.enter_context(patch.dict(table))
        yield


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_a_guide_runs(page, no_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"__name__": "__main__"}
    assert blocks(page)
    for block in blocks(page):
        exec(compile(block, page.name, "exec"), names)
