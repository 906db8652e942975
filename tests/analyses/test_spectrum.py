"""Spectra of kernels: the whole analysis on a tiny model, and its formulas on kernels with known answers."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from analyses import spectrum
from analyses.records import STAGES, Metric, load_result, write_result
from analyses.spectrum import Config, decompose, effective_dimension, label_vectors, learnt, run, summary, time_to_learn
from ntk.dynamics import gradient_flow
from propulsion.errors import UserError

METHODS = ("full", "propulsion:positions=all", "lora:r=2", "bitfit")
STAGE = STAGES[0]


@pytest.fixture(scope="module")
def config(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("spectrum") / "result"
    return Config(model=str(tiny_model), methods=METHODS, n_examples=10, seeds=(0, 1), null_draws=5,
                  output_dir=folder, dtype="float64")  # fmt: skip


@pytest.fixture(scope="module")
def result(config):
    spectrum.ANALYSIS.publish(config)
    return load_result(config.output_dir, analysis="spectrum")


def test_every_curve_and_metric(config, result):
    for name in (*METHODS, "head"):
        values = result.arrays[f"eigenvalues.{name}"]
        assert values.shape == (2, 10)
        np.testing.assert_allclose(values.sum(axis=1), 1)
        np.testing.assert_allclose(result.arrays[f"alignment.{name}"][:, -1], 1)
        assert (np.diff(result.arrays[f"effective_dimension.{name}"]) <= 0).all()
        assert (np.diff(result.arrays[f"learnt.{name}"]) >= 0).all()
    both = result.metric("effective_rank", stage=STAGE, left="full + head")
    assert 1 <= both.value <= 10
    assert result.metric("time to learn 90%", stage=STAGE, left="full", right="permuted labels").value > 0
    # The head's kernel is that of 33 features of one example: rank 10, as all others.
    assert result.arrays["eigenvalues.head"][0, -1] > 0
    assert "label energy in the top 8, permuted labels" in summary(result, markdown=True)
    assert (config.output_dir / "spectrum.png").exists()


def measured(tmp_path, result, steps):
    metrics = [Metric(spectrum.MEASURED, value, None, None, "steps", "trained", name, "") for name, value in steps]
    other = dataclasses.replace(result, analysis="convergence", metrics=metrics, arrays={}, tables={})
    return write_result(other, tmp_path / "convergence")


def test_predicted_speeds_against_measured_ones(config, result, tmp_path):
    name, right = "time to learn 90%", spectrum.MEASURED
    times = {m.left: m.value for m in result.metrics if m.name == name and not m.right}
    folder = measured(tmp_path, result, [(method, 2 * times[method] + 1) for method in METHODS])
    steps = spectrum._measured(dataclasses.replace(config, convergence=folder))
    after = dataclasses.replace(result, metrics=[*result.metrics, *spectrum.against_measured(result.metrics, steps)])
    assert after.metric("rank correlation", stage=STAGE, left=name, right=right).value == pytest.approx(1)
    assert after.metric("rank correlation, methods", stage=STAGE, left=name, right=right).value == 4
    assert "rank correlation" in summary(after)
    # Methods that never learn the labels are left out of the ranking.
    slow = [dataclasses.replace(m, value=math.nan) if m.left == "lora:r=2" else m for m in result.metrics]
    assert {m.value for m in spectrum.against_measured(slow, steps) if m.name.endswith("methods")} == {3, 4}
    few = measured(tmp_path / "few", result, [("full", 1.0)])
    with pytest.raises(UserError, match="three are needed"):
        run(dataclasses.replace(config, convergence=few))


def test_effective_dimension_of_known_eigenvalues():
    np.testing.assert_allclose(effective_dimension(np.ones(5), np.array([1.0, 4.0])), [2.5, 1.0])


def test_learning_is_gradient_flow():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(7, 9, dtype=torch.float64, generator=generator)
    y = label_vectors(np.array([0, 1, 1, 0, 1, 1, 1]), regression=False)
    found = decompose(features @ features.T, y, draws=1, seed=0)
    times = np.array([0.1, 1.0, 10.0])
    K = features @ features.T
    f = gradient_flow(K, torch.from_numpy(y), times=(times / float(K.trace() / 7)).tolist())
    rest = (torch.from_numpy(y) - f).square().sum((1, 2)).numpy()
    np.testing.assert_allclose(learnt(found.values, found.energies, times), 1 - rest, rtol=1e-9)


def test_time_to_learn_one_direction():
    values, energies = np.array([4.0, 1.0, 0.0]), np.array([0.0, 1.0, 0.0])
    assert time_to_learn(values, energies, 0.9) == pytest.approx(math.log(10) / 2)
    assert time_to_learn(values, np.array([0.5, 0.0, 0.5]), 0.9) == math.inf


def test_labels_that_a_kernel_is_made_of_are_in_its_top():
    labels = np.repeat([0, 1], 10)
    y = label_vectors(labels, regression=False)
    kernel = torch.from_numpy(y @ y.T) + 0.01 * torch.eye(20)
    found = decompose(kernel, y, draws=50, seed=0)
    assert found.energies[0] == pytest.approx(1)
    # Permuted labels have the energy of a random direction among the 19.
    assert found.nulls[:, 0].mean() == pytest.approx(1 / 19, abs=0.05)
    np.testing.assert_allclose(found.nulls.sum(axis=1), 1)


def test_mistakes(config):
    with pytest.raises(UserError, match="n_examples must be at least 4"):
        run(dataclasses.replace(config, n_examples=3))
    with pytest.raises(UserError, match="seeds must be one or more"):
        run(dataclasses.replace(config, seeds=()))
    with pytest.raises(UserError, match="one label only"):
        label_vectors(np.zeros(4), regression=False)
