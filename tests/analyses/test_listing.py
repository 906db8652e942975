"""``python -m analyses`` lists every analysis without importing it."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from analyses.__main__ import questions

ROOT = Path(__file__).parent.parent.parent


def test_every_analysis_is_listed_with_its_question_and_cost():
    found = {question.name: question for question in questions()}
    declared = {
        path.relative_to(ROOT / "analyses").parts[0].removesuffix(".py")
        for path in (ROOT / "analyses").rglob("*.py")
        if "\nANALYSIS = " in path.read_text(encoding="utf-8")
    }
    assert declared | {"claims"} == found.keys()
    for name, question in found.items():
        assert find_spec(f"analyses.{name}") is not None
        assert question.words.endswith((".", "?"))
        assert question.cost


def test_the_listing_is_a_command_that_loads_no_torch():
    program = (
        "import runpy, sys; runpy.run_module('analyses', run_name='__main__'); "
        "assert not {'torch', 'transformers', 'peft'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    lines = done.stdout.splitlines()
    assert any(line.startswith("spectrum ") and "What can each method learn, and how fast" in line for line in lines)
