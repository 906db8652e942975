"""The notebooks' code runs, cell by cell in one namespace, and the published notebooks were executed without an error.

The tests do not use Jupyter, so that figures are not shown in the notebook.
"""

import json
import re
from pathlib import Path

import matplotlib as mpl
import pytest
import torch

NOTEBOOKS = sorted((Path(__file__).parent.parent / "docs" / "notebooks").glob("*.ipynb"))
LARGEST = 500_000  # bytes
# The widest networks cost most and test little.
SHORTER = {"widths = (64, 128, 256, 512, 1024)": "widths = (64, 128)"}


def cells(notebook: Path) -> list[dict]:
    found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == "code"]


def named(notebook: Path) -> str:
    return notebook.stem


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=named)
def test_the_published_copy_is_executed_in_order_and_small(notebook):
    assert notebook.stat().st_size < LARGEST
    code = cells(notebook)
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert all(output["output_type"] != "error" and output.get("name") != "stderr" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    # It names the commit that it was executed at, and no path of the machine.
    text = json.dumps(outputs)
    assert re.search(r"'commit': '[0-9a-f]{40}'", text)
    assert not re.search(r"(/home/|/tmp/|/root/)", text)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=named)
def test_its_code_runs(notebook):
    torch.manual_seed(0)
    with mpl.rc_context({"backend": "Agg"}):
        import matplotlib.pyplot as plt

        names: dict = {"__name__": "__main__"}
        try:
            code = ["".join(cell["source"]) for cell in cells(notebook)]
            for whole, part in SHORTER.items():
                assert any(whole in source for source in code)
                code = [source.replace(whole, part) for source in code]
            for source in code:
                exec(compile(source, notebook.name, "exec"), names)
            assert plt.get_fignums()
        finally:
            plt.close("all")
