"""kernel_distance on a tiny model: the content of its result, the effect of seeds, and messages for mistakes."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from analyses.core.errors import MISTAKES
from analyses.kernel_distance import ANALYSIS, Config, analysis, run
from analyses.kernel_distance.kernels import ADAPTER, FULL
from analyses.kernel_distance.tables import summary
from analyses.records import STAGES, load_result, number
from propulsion.training import TrainingOptions


@pytest.fixture(scope="module")
def config(tiny_model):
    training = TrainingOptions(max_steps=3, per_device_train_batch_size=4, seed=3)
    return Config(model=str(tiny_model), n_examples=8, n_validation=12, training=training, null_draws=2, resamples=10)


@pytest.fixture(scope="module")
def result(config):
    return run(config)


def test_every_kernel_is_there_at_both_stages_symmetric_and_positive(result):
    for stage in STAGES:
        for name in ("full_backbone", "full_all", "propulsion_z", "propulsion_z_head"):
            kernel, whole = result.arrays[f"{stage}.{name}"], result.arrays[f"all_outputs.{stage}.{name}"]
            assert kernel.shape == (8, 8)
            np.testing.assert_allclose(kernel, np.trace(whole, axis1=2, axis2=3), rtol=1e-5)
            np.testing.assert_allclose(kernel, kernel.T, rtol=1e-4, atol=1e-6 * np.abs(kernel).max())
            assert np.linalg.eigvalsh(kernel.astype(float)).min() > -1e-5 * np.trace(kernel)


def test_the_head_is_the_same_on_both_sides_at_the_start(result):
    """The head has the same kernel in both models, so that the two differences agree."""
    start = {name.split(".")[1]: k for name, k in result.arrays.items() if name.startswith("initialisation.")}
    head = start["full_all"] - start["full_backbone"]
    np.testing.assert_allclose(start["propulsion_z_head"] - start["propulsion_z"], head, rtol=1e-3, atol=1e-5)
    assert np.trace(head) > 0


def test_training_moved_every_kernel(result):
    for row in result.tables["drift"]:
        assert row["relative_frobenius"] > 0


def test_k_star_is_the_root_of_the_ratio_of_traces_at_degree_one(result):
    full, adapter = (result.arrays[f"initialisation.{name}"] for name in ("full_backbone", "propulsion_z"))
    k_star = result.metric("k_star", stage="initialisation", left="full_backbone", right="propulsion_z").value
    assert k_star == pytest.approx(np.sqrt(np.trace(full) / (np.trace(adapter) / 15**2)), rel=1e-5)


def test_layer_shares_add_up(result):
    for stage in STAGES:
        for kernel in ("full_backbone", "full_all", "propulsion_z", "propulsion_z_head"):
            shares = [r for r in result.tables["layer_shares"] if (r["stage"], r["kernel"]) == (stage, kernel)]
            assert sum(r["trace_share"] for r in shares) == pytest.approx(1, rel=1e-5)


def test_every_pair_has_every_metric_with_its_interval_and_every_null_model(result):
    names = {m.name for m in result.metrics if (m.left, m.right) == ("full_all", "propulsion_z_head")}
    assert names == {
        "alignment", "cka", "best_scale", "trace_ratio", "relative_frobenius", "relative_frobenius_scaled",
        "mean_absolute", "mean_absolute_scaled", "max_absolute", "max_absolute_scaled",
    }  # fmt: skip
    nulls = {m.right for m in result.metrics if m.left == "full_backbone"} - {"", "propulsion_z"}
    assert sorted(null.split()[0] for null in nulls) == ["Gaussian", "Propulsion,", "last", "random"]
    assert all(m.low <= m.high for m in result.metrics if m.low is not None)


def test_coverage_states_the_parameters_of_each_kernel(result, tiny_model):
    total = result.model["parameters"]
    head = 32 * 2 + 2
    assert f"{total:,} parameters" in result.coverage["full_all"]
    assert f"{total - head:,} parameters" in result.coverage["full_backbone"]
    assert f"{result.model['scales']:,} parameters" in result.coverage["propulsion_z"]
    assert f"{result.model['scales'] + head:,} parameters" in result.coverage["propulsion_z_head"]


def test_the_same_seed_gives_the_same_result_and_another_seed_another(config, result):
    again = run(config)
    assert again.metrics == result.metrics
    for name, array in result.arrays.items():
        np.testing.assert_array_equal(again.arrays[name], array)
    other = run(dataclasses.replace(config, training=dataclasses.replace(config.training, seed=4)))
    assert not np.array_equal(other.arrays["trained.full_all"], result.arrays["trained.full_all"])


def test_several_seeds_are_averaged_and_a_killed_run_goes_on(config, result, tmp_path, monkeypatch):
    both = dataclasses.replace(config, seeds=(3, 4), output_dir=tmp_path / "result")
    measured = []

    def killed_at_the_second(one):
        measured.append(one.seed)
        if one.seed == 4 and measured.count(4) == 1:
            raise KeyboardInterrupt
        return measure(one)

    measure = analysis._measure
    monkeypatch.setattr(analysis, "_measure", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(both)
    found = run(both)
    assert measured == [3, 4, 4]
    alone = run(dataclasses.replace(config, seeds=(4,)))
    for metric in found.metrics:
        place = {"stage": metric.stage, "left": metric.left, "right": metric.right}
        each = [one.metric(metric.name, **place).value for one in (result, alone)]
        assert metric.value == pytest.approx(np.mean(each), rel=1e-6), metric
        same = (metric.name, metric.stage, metric.left, metric.right)
        kept = found.tables["seed_values"]
        of_seed = [row["value"] for row in kept if tuple(row[n] for n in ("metric", "stage", "left", "right")) == same]
        assert of_seed == pytest.approx(each, rel=1e-6)
    for row, one, other in zip(found.tables["scores"], result.tables["scores"], alone.tables["scores"], strict=True):
        assert row["accuracy"] == pytest.approx((one["accuracy"] + other["accuracy"]) / 2)
    assert found.arrays.keys() == result.arrays.keys()
    # Cells of other settings are added, and the first cells are kept.
    run(dataclasses.replace(both, null_draws=1))
    assert measured == [3, 4, 4, 4, 3, 4]  # A single seed is measured without a cell.
    run(both)
    assert len(measured) == 6


def test_the_command_prints_a_table_and_writes_numbers_kernels_and_figures(config, tmp_path, capsys):
    ANALYSIS.publish(dataclasses.replace(config, output_dir=tmp_path / "result"))
    printed = capsys.readouterr().out
    assert "full_backbone against propulsion_z" in printed
    assert "score on validation" in printed
    files = {path.name for path in (tmp_path / "result").iterdir()}
    assert files == {"result.json", "kernels.npz", "SHA256SUMS", "kernel_distance.png", "kernel_distance.pdf"}
    stored = load_result(tmp_path / "result")
    assert stored.config["training"]["max_steps"] == 3
    assert summary(stored) in printed
    # The last line says in words what the first rows of the table say.
    *_, last = printed.splitlines()
    names = ("relative_frobenius", "relative_frobenius_scaled")
    found = [stored.metric(name, stage=stage, left=FULL, right=ADAPTER).value for stage in STAGES for name in names]
    assert len(found) == 4
    assert all(number(value) in last for value in found)
    assert last.startswith("Found: the relative distance of Propulsion's kernel")
    assert json.loads((tmp_path / "result" / "result.json").read_text())["seed"] == 3


def test_an_earlier_result_is_not_replaced_unasked(config, tmp_path):
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(MISTAKES, match="already holds a result"):
        ANALYSIS.publish(dataclasses.replace(config, output_dir=tmp_path))


def test_a_regression_task_works(config, tmp_path):
    for split in ("train", "validation"):
        lines = ["sentence1\tsentence2\tlabel"] + [f"word {i}\tother word {i}\t{i % 6}" for i in range(12)]
        (tmp_path / f"{split}.tsv").write_text("\n".join(lines))
    found = run(dataclasses.replace(config, task="stsb", data_dir=tmp_path))
    assert {"pearson", "spearman"} <= set(found.tables["scores"][0])
    assert found.arrays["all_outputs.trained.full_all"].shape == (8, 8, 1, 1)
    assert found.config["degree"] == 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "sts"}, "unknown task"),
        ({"n_examples": 1}, "at least 2"),
        ({"n_examples": 10**6}, "cannot draw 1000000"),
        ({"positions": ("nowhere",)}, "positions must be"),
        ({"degree": 0.0}, "degree must be"),
        ({"device": "tpu9"}, "device"),
        ({"seeds": (1, 1)}, "seeds must be one or more different numbers"),
        ({"memory_budget_gb": 1e-6}, "raise memory_budget"),
        ({"model": "/no/such/folder"}, "cannot load model"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_mistake_is_named_before_anything_is_written(config, tmp_path, changes, message):
    output = tmp_path / "result"
    with pytest.raises(MISTAKES, match=message):
        ANALYSIS.publish(dataclasses.replace(config, output_dir=output, **changes))
    assert not output.exists()


def test_from_the_shell_a_mistake_is_one_line_and_exit_code_two():
    command = [sys.executable, "-m", "analyses.kernel_distance", "--task", "sst3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "unknown task 'sst3'" in done.stderr
