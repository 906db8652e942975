"""Kernels in a notebook: arrays and tensors, in given and new axes; numbers are those of `ntk`."""

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure

import figures
import ntk
from analyses.records import Metric, RecordError, Result
from figures.kernels import alignments, relative_spectrum


def kernel(n=6, c=None, seed=0):
    J = torch.from_numpy(np.random.default_rng(seed).normal(size=(n, c or 1, 40)))
    K = torch.einsum("iap,jbp->ijab", J, J)
    return K[:, :, 0, 0] if c is None else K


@pytest.fixture(autouse=True)
def closed():
    yield
    pyplot.close("all")


@pytest.mark.parametrize("c", [None, 3])
@pytest.mark.parametrize("kind", [torch.Tensor, np.ndarray])
def test_all_three_take_arrays_and_tensors(c, kind):
    kernels = {"a": kernel(c=c), "b": kernel(c=c, seed=1).requires_grad_()}
    if kind is np.ndarray:
        kernels = {name: K.detach().numpy() for name, K in kernels.items()}
    drawn = figures.heatmap(kernels["a"]).images[0].get_array()
    expected = kernels["a"] if c is None else np.einsum("ijaa->ij", np.asarray(kernels["a"]))
    np.testing.assert_allclose(drawn, np.asarray(expected))
    page = Figure()
    axes = page.subplots(1, 2)
    assert figures.alignment_matrix(kernels, axes[0]) is axes[0]
    assert figures.spectra(kernels, axes[1]) is axes[1]
    assert [line.get_label() for line in axes[1].get_lines()] == ["a", "b"]
    assert {text.get_text() for text in axes[0].texts} >= {"1.00"}


@pytest.mark.parametrize("c", [None, 3])
def test_numbers_are_those_of_ntk(c):
    kernels = {name: kernel(c=c, seed=seed) for seed, name in enumerate("abc")}
    values = alignments(kernels)
    for i, a in enumerate(kernels.values()):
        for j, b in enumerate(kernels.values()):
            assert values[i, j] == pytest.approx(ntk.cka(a, b), abs=1e-12)
    eigenvalues = torch.linalg.eigvalsh(ntk.flatten(kernels["a"])).flip(0)
    np.testing.assert_allclose(relative_spectrum(kernels["a"]), eigenvalues / eigenvalues[0], rtol=1e-9)


def test_examples_are_ordered_by_their_labels_and_signs_have_colours():
    K = np.arange(9.0).reshape(3, 3)
    drawn = figures.heatmap(K, labels=[1, 0, 1]).images[0]
    np.testing.assert_array_equal(drawn.get_array(), K[np.ix_([1, 0, 2], [1, 0, 2])])
    assert drawn.get_clim()[0] == 0
    low, high = figures.heatmap(K - 4).images[0].get_clim()
    assert low == -high


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: figures.heatmap(np.zeros(3)), r"expected a kernel \(n, n\)"),
        (lambda: figures.heatmap(np.full((2, 2), np.nan)), "finite"),
        (lambda: figures.heatmap(np.eye(3), labels=[0, 1]), "one label for each example; got 2"),
        (lambda: figures.alignment_matrix({}), "at least one kernel"),
        (lambda: figures.alignment_matrix({"a": np.eye(2), "b": np.eye(3)}), "their sizes differ"),
        (lambda: figures.alignment_matrix({"a": np.ones((3, 3))}), "a is constant"),
        (lambda: figures.spectra({"a": np.ones((2, 3))}), "square"),
        (lambda: figures.spectra({"a": np.zeros((2, 2))}), "positive eigenvalue"),
    ],
)
def test_what_is_no_kernel_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_result_is_a_data_frame_of_its_metrics_or_of_a_table():
    metric = Metric("cka", 0.5, 0.4, 0.6, "", "initialisation", "full", "lora")
    result = Result("x", {}, 0, [metric], {"rows": [{"a": 1}, {"a": 2}]}, {}, {}, {}, {}, {}, {})
    frame = result.to_frame()
    assert list(frame.columns[:2]) == ["name", "value"]
    assert frame["value"].tolist() == [0.5]
    assert result.to_frame("rows")["a"].tolist() == [1, 2]
    with pytest.raises(RecordError, match="no table 'row'; its tables are rows"):
        result.to_frame("row")
