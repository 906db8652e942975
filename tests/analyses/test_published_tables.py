"""The tables in the pages of results agree with the stored results."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from analyses import method_comparison, readme, spectrum
from analyses.core.comparison import directions
from analyses.core.intervals import LOG, between, mean_interval
from analyses.core.scales import limits, scale_of, within
from analyses.records import STAGES, RecordError, load_result
from analyses.subjects.paired_scores import score_metrics

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


ANALYSES = ("kernel_distance", "peft_kernels", "kernel_drift", "linearized_prediction", "spectrum", "ablation",
            "convergence", "method_comparison")  # fmt: skip
FOLDERS = sorted(path.parent for name in ANALYSES for path in (STORED / name).rglob("result.json"))


def possible(result, metric) -> tuple[float, float]:
    """The least and the greatest possible value of a metric."""
    if "difference" in metric.stage or method_comparison.CHANGE in metric.stage:
        return limits(scale_of(metric.name))
    if metric.name.startswith("rank correlation"):
        return -1.0, 1.0
    if result.analysis == "spectrum":
        scale = spectrum.scale_of_quantity(metric.name, result.arrays["eigenvalues.full"].shape[1])
    elif metric.name == "effective_rank":
        scale = between(1.0, len(result.arrays["labels"]))
    elif "steps to" in metric.name:
        scale = LOG
    else:
        scale = scale_of(result.dataset["metric"] if "score" in metric.name else metric.name)
    return scale.low, scale.high


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.relative_to(STORED).as_posix())
def test_no_published_interval_leaves_the_possible_values(folder):
    result = load_result(folder)
    for metric in result.metrics:
        low, high = possible(result, metric)
        for end in (metric.value, metric.low, metric.high):
            assert end is None or math.isnan(end) or low - 1e-9 <= end <= high + 1e-9, metric


@pytest.mark.parametrize(
    "folder", [folder for folder in FOLDERS if folder.parent.name in ("kernel_distance", "peft_kernels")],
    ids=lambda folder: folder.relative_to(STORED).as_posix(),
)  # fmt: skip
def test_published_intervals_of_kernels_follow_from_the_values_of_every_seed(folder):
    result = load_result(folder)
    values: dict[tuple, list[float]] = {}
    for row in result.tables["seed_values"]:
        key = (row.get("stage", STAGES[0]), row["metric"], row["left"], row["right"])
        values.setdefault(key, []).append(math.nan if row["value"] is None else row["value"])
    for m in result.metrics:
        scale = between(1.0, len(result.arrays["labels"])) if m.name == "effective_rank" else scale_of(m.name)
        expected = mean_interval(within(values[m.stage, m.name, m.left, m.right], scale), scale)
        found = [math.nan if x is None else x for x in (m.value, m.low, m.high)]
        assert found == pytest.approx(expected, rel=1e-9, nan_ok=True), m


def test_published_differences_follow_from_the_published_predictions():
    result = load_result(STORED / "method_comparison" / "sst2")
    methods, seeds = [row["method"] for row in result.tables["summary"]], (0, 1, 2)
    predictions = {m: np.stack([result.arrays[f"predictions.sst2.{m}.{s}"] for s in seeds]) for m in methods}
    metrics, rows = score_metrics("sst2", predictions, result.arrays["labels.sst2"], method_comparison.REFERENCE)
    for m in metrics:
        stored = result.metric(m.name, stage=m.stage, left=m.left, right=m.right)
        assert (stored.value, stored.low, stored.high) == pytest.approx((m.value, m.low, m.high))
    assert [row["p_holm"] for row in result.tables["comparisons"]] == pytest.approx([row["p_holm"] for row in rows])
