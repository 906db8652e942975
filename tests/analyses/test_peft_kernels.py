"""The kernels of all methods on a tiny model: what the result holds, and what a mistake prints."""

import dataclasses
import re

import numpy as np
import pytest
import torch

import ntk
from analyses.peft_kernels import FULL, REFERENCE, STAGE, Config, label_kernel, main, run
from analyses.peft_kernels_tables import summary
from analyses.results import load_result
from figures.peft_kernels import draw
from propulsion.errors import UserError
from propulsion.pretrained import load_classifier


@pytest.fixture(scope="module")
def config(tiny_model):
    return Config(
        model=str(tiny_model), n_examples=6, positions=("attn",), ranks=(1, 2), vera_rank=3, subset=5, top=2,
        null_draws=2, resamples=5, seed=3, dtype="float64",
    )  # fmt: skip


@pytest.fixture(scope="module")
def result(config):
    return run(config)


def value(result, name, left=FULL, right=""):
    return result.metric(name, stage=STAGE, left=left, right=right).value


def test_full_fine_tuning_is_the_kernel_of_the_backbone(config, result, tiny_model):
    model, _ = load_classifier(str(tiny_model), num_labels=2, seed=3, dtype=torch.float64)
    backbone = sum(p.numel() for name, p in model.named_parameters() if name.startswith("bert."))
    assert result.model["parameters"] - backbone == 32 * 2 + 2
    assert np.linalg.eigvalsh(result.arrays[f"{STAGE}.{FULL}"]).min() > -1e-12 * value(result, "trace")
    whole = [result.arrays[f"{STAGE}.{name}"] for name in ("linear: full, whole", "BitFit", "norm tuning")]
    # Weights, and parameters that are no biases of linear layers, are parts of everything.
    assert value(result, "trace") > np.trace(whole[0])
    assert value(result, "trace") > np.trace(whole[1])


def test_the_degree_changes_the_size_alone(result):
    for metric in ("cka", "alignment", "eigenspace_overlap"):
        assert value(result, metric, right="Propulsion, degree 15") == pytest.approx(
            value(result, metric, right=REFERENCE), rel=1e-9
        )
    ratio = value(result, "trace_ratio", right=REFERENCE) / value(result, "trace_ratio", right="Propulsion, degree 15")
    assert ratio == pytest.approx(15**2)
    assert value(result, "k_star", right=REFERENCE) ** 2 == pytest.approx(value(result, "trace_ratio", right=REFERENCE))


def test_every_method_has_every_metric_and_there_are_all_null_models(result):
    for name in (row["method"] for row in result.tables["methods"]):
        for metric in ("trace", "effective_rank"):
            assert value(result, metric, left=name) > 0
        assert abs(value(result, "label_cka", left=name, right="labels")) <= 1
        for metric in ("cka", "alignment", "trace_ratio", "eigenspace_overlap"):
            assert name == FULL or np.isfinite(value(result, metric, right=name))
    nulls = [row["null"].split()[0] for row in result.tables["nulls"]]
    assert nulls == ["Gaussian", "Propulsion,", "random", "last"]


def test_the_split_adds_up_and_is_compared_part_by_part(result):
    for row in result.tables["split"]:
        assert row["common"] + row["residual"] + row["cross"] == pytest.approx(1)
    for part in ("whole", "common", "residual"):
        pair = [result.arrays[f"{STAGE}.linear: {name}, {part}"] for name in ("full", "Propulsion")]
        expected = ntk.cka(*map(torch.from_numpy, pair))
        assert value(result, "cka", f"linear: full, {part}", f"linear: Propulsion, {part}") == pytest.approx(expected)


def test_label_kernels():
    labels = np.array([0, 2, 2])
    assert label_kernel(labels, regression=False).tolist() == [[1, 0, 0], [0, 1, 1], [0, 1, 1]]
    assert label_kernel(labels / 2, regression=True).tolist() == [[0, 0, 0], [0, 1, 1], [0, 1, 1]]


def test_the_figure_has_a_dot_a_method_at_its_value_and_the_map_is_the_table(result):
    dots, similarity = draw(result).axes[:2]
    drawn = [np.asarray(line.get_xdata())[0] for line in dots.get_lines() if str(line.get_marker()) in "os"]
    names = [row["method"] for row in result.tables["methods"]][1:]
    nulls = [value(result, "cka", right=row["null"]) for row in result.tables["nulls"]]
    methods = sorted((value(result, "cka", right=name) for name in names), reverse=True)
    assert drawn == pytest.approx([*methods, *nulls])
    (image,) = similarity.get_images()
    matrix = np.asarray(image.get_array())
    np.testing.assert_allclose(matrix[0], [1, *methods])
    np.testing.assert_allclose(matrix, matrix.T)


def test_the_command_writes_what_it_prints(config, tmp_path, capsys):
    main(dataclasses.replace(config, output_dir=tmp_path / "result"))
    files = {path.name for path in (tmp_path / "result").iterdir()}
    assert files == {"result.json", "kernels.npz", "peft_kernels.png", "peft_kernels.pdf"}
    assert summary(load_result(tmp_path / "result")) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_examples": 1}, "n_examples must be at least 2"),
        ({"top": 7}, "top must be between 1 and the 6 examples"),
        ({"ranks": ()}, "ranks must be"),
        ({"positions": ("nowhere",)}, "nowhere"),
        ({"task": "sts"}, "unknown task"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_mistake_is_named(config, tmp_path, changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        main(dataclasses.replace(config, output_dir=tmp_path / "result", **changes))
    assert not (tmp_path / "result").exists()
