"""The analyses behind docs/theory.md at small sizes; and the tests that the page names exist."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from cases import batch_for, classifier
from peft import get_peft_model

from analyses import degree_scale, johnson_lindenstrauss, theorem1, width_convergence
from analyses.records import load_result
from figures.figure import redraw
from propulsion import PropulsionConfig
from propulsion.errors import UserError

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")


def test_every_test_that_the_page_names_exists():
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    written = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert named
    assert not {name for name in named if f"def {name}(" not in written}
    files = set(re.findall(r"`(tests/[\w/]+\.py)`", PAGE))
    assert not {file for file in files if not (ROOT / file).exists()}
    for module in re.findall(r"`python -m analyses\.(\w+)`", PAGE):
        assert importlib.util.find_spec(f"analyses.{module}") is not None


def numbered() -> dict[str, str]:
    """The theorems, propositions and corollaries of the page, each with its text up to the next one or section."""
    parts = re.split(r"(?m)^(?=\*\*(?:Theorem|Proposition|Corollary) \d|## )", PAGE)
    found = {part.split("**")[1]: part for part in parts if part.startswith("**")}
    assert len(found) >= 20
    return found


@pytest.mark.parametrize("statement", numbered())
def test_every_numbered_statement_names_its_test_and_its_figure(statement):
    """And the folders of results that it names hold a result."""
    text = numbered()[statement]
    assert "`test_" in text
    folders = re.findall(r"\]\((results/[\w/-]+)/README\.md\)", text)
    assert folders or "No figure." in text
    for folder in folders:
        assert list((ROOT / "docs" / folder).rglob("result.json")), folder


def assert_draws_again(analysis: str, folder: Path) -> None:
    """Check that drawing the stored result again gives the figure in the result folder."""
    redraw(analysis, importlib.import_module(f"figures.{analysis}").write, folder / "out", folder / "again")
    for suffix in ("png", "pdf"):
        first, again = (folder / where / f"{analysis}.{suffix}" for where in ("out", "again"))
        assert first.read_bytes() == again.read_bytes()


def test_the_bound_holds_in_every_cell_and_the_exact_values_lie_in_their_intervals(tmp_path, capsys):
    dimensions = (2, 4, 16, 64, 128, 256, 512, 1024)
    config = johnson_lindenstrauss.Config(dimensions=dimensions, draws=4000, output_dir=tmp_path / "out")
    johnson_lindenstrauss.ANALYSIS.publish(config)
    assert capsys.readouterr().out.splitlines()[: len(dimensions)] == [f"dimension {d} ..." for d in dimensions]
    result = load_result(tmp_path / "out", analysis="johnson_lindenstrauss")
    counts = {m.name: m.value for m in result.metrics}
    assert counts["cells"] == 200
    assert counts["cells_above_bound"] == 0
    assert counts["cells_beside_exact_tail"] <= 2  # Of 200 intervals at 99.9 %.
    assert counts["variances"] == 40
    assert counts["variances_beside_exact"] == 0
    assert counts["median_bound_over_exact"] > 2  # the bound is far from sharp
    assert_draws_again("johnson_lindenstrauss", tmp_path)


def test_kernels_reach_their_limits_as_one_over_root_width(tmp_path):
    config = width_convergence.Config(
        activations=("gelu",), widths=(32, 64, 128, 256), draws=8, output_dir=tmp_path / "out"
    )
    width_convergence.ANALYSIS.publish(config)
    result = load_result(tmp_path / "out", analysis="width_convergence")
    assert {(m.left, m.right) for m in result.metrics} == {
        ("full", "gelu, ntk"), ("propulsion", "gelu, ntk"), ("propulsion", "gelu, standard"),
    }  # fmt: skip
    for m in result.metrics:
        assert m.low < m.value < m.high
        assert m.low - 0.1 < -0.5 < m.high + 0.1, m  # The slopes of eight networks have an error of about 0.1.
    rows = {(r["activation"], r["parametrization"], r["width"]): r for r in result.tables["widths"]}
    wide = rows["gelu", "ntk", 256]
    assert wide["gap"] == pytest.approx(wide["gap_of_the_limits"], rel=0.25)
    assert_draws_again("width_convergence", tmp_path)
    standard = [rows["gelu", "standard", w]["trace_ratio"] for w in config.widths]
    assert standard[-1] > 4 * standard[0]  # It grows with the width, eightfold here.
    for w in config.widths:  # The functions are the same, and so is the kernel of Propulsion.
        assert rows["gelu", "standard", w]["error_propulsion"] == pytest.approx(
            rows["gelu", "ntk", w]["error_propulsion"]
        )


def test_theorem_1_literal_corrected_and_failing(tmp_path):
    config = theorem1.Config(
        n_in=128, width=256, depth=2, draws=2, transformer_widths=(16, 128), transformer_draws=4,
        output_dir=tmp_path / "out",
    )  # fmt: skip
    theorem1.ANALYSIS.publish(config)
    result = load_result(tmp_path / "out", analysis="theorem1")
    rows = {r["case"]: r for r in result.tables["cases"]}
    for case in ("linear", "ReLU", "leaky ReLU"):
        assert rows[case]["literal"] < 1e-12
        assert rows[case]["corrected"] < 1e-12
    assert rows["ReLU, biases trained"]["corrected"] < 1e-12
    assert rows["ReLU, biases trained"]["literal"] > 1e-2
    assert rows["ReLU, finite"]["literal"] < 0.25
    for case in ("ReLU, not on the input", "GELU", "erf", "residual ReLU"):
        assert rows[case]["literal"] > 0.03, case
        assert rows[case]["corrected"] > 0.03, case


def test_the_matching_degree_is_one_over_the_spread_of_random_weights(tmp_path):
    config = degree_scale.Config(
        widths=(32, 64, 128), depths=(1, 2), draws=3, n_examples=4, output_dir=tmp_path / "out"
    )
    degree_scale.ANALYSIS.publish(config)
    rows = load_result(tmp_path / "out", analysis="degree_scale").tables["ratios"]
    by_width = {r["width"]: r for r in rows if r["kind"] == "random network" and r["depth"] == 2}
    assert by_width[32]["matching_degree"] < by_width[64]["matching_degree"] < by_width[128]["matching_degree"]
    for r in rows:
        assert r["low"] <= r["matching_degree"] <= r["high"]
        if r["kind"] == "random network":
            assert r["matching_degree"] == pytest.approx(r["expected"], rel=0.15)
        if r["kind"] == "random architecture" and r["model"] != "GPT-2":  # GPT-2 has some smaller initial weights.
            assert r["expected"] == pytest.approx(50)  # 1 / 0.02, the initial standard deviation.
            assert r["matching_degree"] == pytest.approx(50, rel=0.2)
    assert any(r["kind"] == "pre-trained" for r in rows)
    assert_draws_again("degree_scale", tmp_path)


def test_a_norm_leaves_one_direction_of_the_scales_before_it_dead():
    model = get_peft_model(classifier("bert"), PropulsionConfig(degree=3, positions="embedding")).eval()
    batch = batch_for("bert")
    model(**batch).logits[:, 0].sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) == 3
    size = float(torch.cat(gradients).abs().sum())
    assert abs(float(sum(g.sum() for g in gradients))) < 1e-8 * size
    assert abs(float(gradients[0].sum())) > 1e-3 * size  # Single layers have no dead direction.


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: johnson_lindenstrauss.run(johnson_lindenstrauss.Config(epsilons=(1.5,))), "epsilons are out of range"),
        (lambda: johnson_lindenstrauss.run(johnson_lindenstrauss.Config(draws=3)), "draws must be at least 100"),
        (lambda: width_convergence.run(width_convergence.Config(activations=("step",))), "unknown activation 'step'"),
        (lambda: width_convergence.run(width_convergence.Config(widths=(8,))), "at least two widths"),
        (lambda: theorem1.run(theorem1.Config(draws=0)), "draws must be at least 1"),
        (lambda: theorem1.run(theorem1.Config(transformer_widths=(5,))), "must be even"),
        (lambda: degree_scale.run(degree_scale.Config(widths=(30,))), "multiples of 4"),
        (lambda: degree_scale.run(degree_scale.Config(tasks=("glue",))), "unknown task 'glue'"),
    ],
)
def test_mistakes(run, message):
    with pytest.raises(UserError, match=message):
        run()
