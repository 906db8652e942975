"""What is divided by the size of a kernel, a weight or a spectrum is refused, or no number, where that size is zero."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

import ntk
from analyses import decomposition, degree_scale, delta_weights, spectrum
from analyses.choose import predictors
from analyses.linearized_prediction.predictors import flow, predict, regression, sign_regression
from analyses.subjects.trained_methods import check_influence
from propulsion.errors import UserError

ZERO = torch.zeros(8, 8, dtype=torch.float64)
RESIDUAL = torch.ones(8, 1, dtype=torch.float64)


def test_a_spectrum_relative_to_the_mean_eigenvalue():
    with pytest.raises(ntk.UndefinedMetricError, match="zero kernel"):
        spectrum.decompose(ZERO, np.ones((8, 1)), draws=1, seed=0)


@pytest.mark.parametrize("predictor", [regression, flow, sign_regression])
def test_ridges_and_times_relative_to_the_mean_eigenvalue(predictor):
    with pytest.raises(ntk.UndefinedMetricError, match="mean eigenvalue 0"):
        predictor(ZERO, RESIDUAL, ZERO)
    one = torch.zeros(8, 8, dtype=torch.float64)
    one[7, 7] = 1.0  # Zero on the training rows alone.
    with pytest.raises(ntk.UndefinedMetricError, match="mean eigenvalue 0"):
        predict(predictor, one, torch.ones(6), torch.zeros(8), seed=0)


def test_a_method_without_influence_is_named():
    with pytest.raises(UserError, match="the kernel of lora is zero"):
        check_influence({"full": torch.eye(3), "lora": torch.zeros(3, 3)})
    check_influence({"full": torch.eye(3)})


def test_an_analysis_names_the_method(tiny_model, monkeypatch):
    original = ntk.adapter_kernels

    def without_influence(*arguments, **options):
        found = original(*arguments, **options)
        return found | {"lora": torch.zeros_like(found["lora"])}

    monkeypatch.setattr(ntk, "adapter_kernels", without_influence)
    with pytest.raises(UserError, match="the kernel of lora is zero"):
        spectrum.run(
            spectrum.Config(model=str(tiny_model), methods=("full", "lora"), n_examples=6, seeds=(0,), null_draws=2)
        )


def test_predictors_of_candidates_have_no_value():
    kernel = ZERO[:4, :4, None, None].expand(4, 4, 2, 2)
    outputs, labels = np.zeros((4, 2)), np.array([0, 1, 0, 1])
    assert predictors.kernel_regression_score(kernel, outputs, labels) is None
    assert predictors.effective_dimension(kernel) is None
    one = torch.eye(4, dtype=torch.float64)[:, :, None, None]
    assert predictors.kernel_regression_score(one, np.zeros((4, 1)), np.full(4, 0.5)) is None
    assert predictors.kernel_regression_score(one, np.zeros((4, 1)), np.arange(4.0)) is not None


def test_the_evidence_of_features_that_are_zero_is_that_of_noise_alone():
    y = np.array([1.0, -2.0, 0.5, 3.0])
    expected = stats.norm(scale=math.sqrt(float(y @ y) / 4)).logpdf(y).mean()
    assert predictors.log_evidence(np.zeros((4, 3)), y) == pytest.approx(expected)


def test_the_change_of_a_weight_of_zeros_has_no_relative_size():
    found = delta_weights.singular_value_measures(torch.eye(3), torch.zeros(3, 3))
    assert math.isnan(found["relative_size"])
    assert found["effective_rank_share"] == pytest.approx(1)


def test_a_degree_for_a_kernel_of_zeros():
    config = degree_scale.Config()
    with pytest.raises(UserError, match="model: Propulsion's kernel is zero"):
        degree_scale._row("pre-trained", "model", np.ones(3), np.zeros(3), config, width=1, depth=1, expected=1.0)


def test_a_part_of_the_decomposition_that_is_zero_has_no_ratios():
    kernel = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    parts = (decomposition.FULL, decomposition.METRIC, decomposition.SCALES, decomposition.ROTATED)
    arrays = {f"{part}: {label}": (kernel @ kernel.T).numpy() for part in parts for label in ("query 0", "key 0")}
    arrays |= {f"{decomposition.METRIC}: key 0": np.zeros((4, 4), dtype=np.float32)}
    cell = {"arrays": arrays, "scaled_traces": {"query 0": 1.0, "key 0": 0.0}}
    groups = {"query": ["query 0"], "key": ["key 0"], decomposition.ALL: ["query 0", "key 0"]}
    found = decomposition._measures(decomposition.Config(null_draws=1), cell, groups, 0)
    assert {name for name, value in found["key"].items() if math.isnan(value)} >= {"metric_ratio", "scales_ratio"}
    assert not np.isnan(list(found["query"].values())).any()
    row = decomposition._row("key", [], [found["key"]] * 2)
    assert row["metric_ratio"] is row["metric_ratio_low"] is None
