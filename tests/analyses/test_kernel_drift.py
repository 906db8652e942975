"""Drift during training: measured on a tiny model and compared with plain autograd; the whole analysis, resumed."""

from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pytest
import torch

from analyses import kernel_drift
from analyses.kernel_drift import measures, probe
from analyses.kernel_drift.measures import OTHER_EXAMPLE, OTHER_HEAD, PERMUTED
from analyses.kernel_drift.tables import is_lazy, summary
from analyses.records import Metric, load_result
from analyses.subjects.training_run import RunConfig, training_run
from figures import kernel_drift as figure
from figures.style import PAGE_WIDTH, save
from propulsion.errors import UserError
from propulsion.methods import Method, apply_method
from propulsion.pretrained import load_classifier
from propulsion.training import TrainingOptions

METHODS = ("full", "propulsion:positions=all", "lora")
EXACT = {"rtol": 1e-9, "atol": 1e-12}


@pytest.fixture(scope="module")
def config(tiny_model, tmp_path_factory):
    runs = RunConfig(model=str(tiny_model), n_train=16, n_validation=12, degree=3,
                     training=TrainingOptions(max_steps=4, per_device_train_batch_size=4, max_length=32,
                                              learning_rate=0.01))  # fmt: skip
    return kernel_drift.Config(
        seeds=(0, 1), n_examples=6, n_jacobians=3, width=8, resamples=10, checkpoints=(0.4,), run=runs,
        output_dir=tmp_path_factory.mktemp("drift") / "result",
    )  # fmt: skip


@pytest.fixture(scope="module")
def result(config):
    while not (config.output_dir / "result.json").exists():
        kernel_drift.ANALYSIS.publish(replace(config, max_runs=4))
    return load_result(config.output_dir, analysis="kernel_drift")


# --- the probe against plain autograd ---------------------------------------------------------------------------------


@pytest.fixture(params=METHODS)
def moved(request, tiny_model):
    """A float64 model with changed parameters, its initial parameters, and padded inputs."""
    model, tokenizer = load_classifier(tiny_model, num_labels=2, dtype=torch.float64)
    model = apply_method(model, Method.parse(request.param).with_defaults(degree=3), task_type="SEQ_CLS").eval()
    start = probe.trained_values(model)
    generator = torch.Generator().manual_seed(1)
    linearized = probe.Linearized(model, "trainable")
    with torch.no_grad():
        for name, delta in zip(linearized.names, linearized.delta, strict=True):
            delta.copy_(0.02 * torch.randn(delta.shape, generator=generator, dtype=torch.float64))
            model.get_parameter(name).add_(delta)
    inputs = dict(tokenizer(["good", "a rather long and bad film", "so so"], padding=True, return_tensors="pt"))
    return model, start, inputs, linearized


def jacobians(model, inputs, names):
    """Jacobians ``(m, c, p)`` by autograd, for each example without padding and each output."""
    parameters = [model.get_parameter(name) for name in names]
    rows = []
    for i, length in enumerate(inputs["attention_mask"].sum(1)):
        outputs = model(**{key: value[i : i + 1, :length] for key, value in inputs.items()}).logits[0]
        for value in outputs:
            found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            rows.append(torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten()
                                   for p, g in zip(parameters, found, strict=True)]))  # fmt: skip
    return torch.stack(rows).unflatten(0, (len(inputs["input_ids"]), -1))


def test_jacobians_and_kernels_are_autograds(moved):
    model, start, inputs, _ = moved
    own = probe.own_parameters(model)
    block = probe.Block.choose(model, own, "value", 5)
    found = probe.jacobian_drift(model, inputs, start, own, block)
    now = jacobians(model, inputs, own)
    head = {name: value for name, value in start.items() if name not in own}
    with probe.parameters_at(model, head):
        same_head = jacobians(model, inputs, own)
    with probe.parameters_at(model, start):
        before = jacobians(model, inputs, own)
        blocks = jacobians(model, inputs, [block.parameter])
    expected = {"moved": now - before, "moved_same_head": same_head - before, "start": before,
                "shifted": now - before.roll(1, 0)}  # fmt: skip
    for name, difference in expected.items():
        torch.testing.assert_close(getattr(found, name).sum(0), difference.square().sum((1, 2)), **EXACT)
    torch.testing.assert_close(found.block_start, blocks[:, 1, :5], **EXACT)
    kernel = probe.traced_kernel(model, inputs, own)
    torch.testing.assert_close(kernel, torch.einsum("iap,jap->ij", now, now), **EXACT)


def test_the_linearisation_is_the_jacobian_times_the_movement(moved):
    model, start, inputs, linearized = moved
    with probe.parameters_at(model, start):
        initial = probe.batched_outputs(model, inputs, lambda **named: model(**named).logits)
        J = jacobians(model, inputs, list(start))
    delta = torch.cat([p.detach().flatten() for p in linearized.delta])
    found = probe.batched_outputs(model, inputs, linearized)
    torch.testing.assert_close(found, initial + J @ delta, **EXACT)
    assert not torch.allclose(found, initial, rtol=1e-3)


def test_parameters_come_back_after_an_error(moved):
    model, start, _, _ = moved
    before = probe.trained_values(model)
    with pytest.raises(KeyError), probe.parameters_at(model, start):
        raise KeyError
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in before.items())


@pytest.mark.parametrize(
    ("method", "parameter"),
    [("full", "value.bias"), ("propulsion:positions=all", "value.propulsion_z.default"),
     ("lora", "value.lora_B.default.weight"), ("lora:target_modules=query+", "query.lora_B.default.weight")],
)  # fmt: skip
def test_the_block_is_the_smallest_of_the_last_module(tiny_model, method, parameter):
    model = apply_method(load_classifier(tiny_model, num_labels=2)[0], Method.parse(method), task_type="SEQ_CLS")
    own = probe.own_parameters(model)
    assert not any("classifier" in name for name in own)
    assert probe.Block.choose(model, own, "value", 48).parameter.endswith(parameter)


def test_the_head_alone_has_no_kernel_of_its_own(tiny_model):
    model = apply_method(load_classifier(tiny_model, num_labels=2)[0], Method("head"), task_type="SEQ_CLS")
    with pytest.raises(UserError, match="trains the head alone"):
        probe.own_parameters(model)


# --- what is made of it -----------------------------------------------------------------------------------------------


def planted(kernels, outputs=None, linearized=None):
    T, n = len(kernels), len(kernels[0])
    outputs = torch.zeros(T, n, 2) if outputs is None else outputs
    norms = {name: torch.ones(T - 1, 2, 3) for name in ("moved", "moved_same_head", "start", "shifted")}
    arrays = norms | {"moved": norms["moved"] / 4, "kernels": torch.stack(list(kernels)), "outputs": outputs,
                      "linearized": outputs if linearized is None else linearized}  # fmt: skip
    points = [{"step": t, "score": 0.5, "parameter_drift": 0.0, "head_drift": 0.0} for t in range(T)]
    return {"arrays": {name: value.numpy() for name, value in arrays.items()}, "points": points,
            "scores": {"accuracy": 0.5}}  # fmt: skip


@pytest.fixture
def kernel():
    features = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    return features @ features.T


def test_a_kernel_that_only_grew(kernel):
    found = dict(measures.method_estimates([planted([kernel, 3 * kernel])], 1, resamples=20))
    values = {name: estimate.value for name, estimate in found.items()}
    assert values["relative_kernel_drift"] == pytest.approx(2)
    assert values["kernel_alignment_with_start"] == pytest.approx(1)
    assert values["kernel_cka_with_start"] == pytest.approx(1)
    assert values["kernel_trace_ratio"] == pytest.approx(3)
    assert values["relative_jacobian_drift"] == pytest.approx(0.5)
    assert np.isnan(values["linearisation_error"])  # No parameter has changed.


def test_the_error_of_the_linearisation(kernel):
    generator = torch.Generator().manual_seed(0)
    start, step = torch.randn(8, 2, generator=generator), torch.randn(8, 2, generator=generator)
    outputs = torch.stack([start, start + step])
    cell = planted([kernel, kernel], outputs, torch.stack([start, start + 0.75 * step]))
    found = dict(measures.method_estimates([cell, cell], 1, resamples=20))
    assert found["linearisation_error"].by_seed == pytest.approx((0.25, 0.25))
    assert found["linearised_movement"].value == pytest.approx(0.75)
    low, high = found["linearisation_error"].examples
    assert (low, high) == pytest.approx((0.25, 0.25))  # The norms do not depend on the example.
    nulls = {(name, right): e.value for name, right, e in measures.method_nulls([cell, cell], draws=2)}
    order = measures.order(8, 0)
    expected = float((step - 0.75 * step[order]).norm() / step.norm())
    assert nulls["null_linearisation_error", PERMUTED] == pytest.approx(expected)
    assert nulls["null_relative_jacobian_drift", OTHER_EXAMPLE] == pytest.approx(1)
    assert nulls["null_relative_kernel_drift", OTHER_HEAD] == 0
    assert nulls["null_kernel_cka_with_start", PERMUTED] < 0.9


def test_intervals_over_seeds_and_examples(kernel):
    cells = [planted([kernel, scale * kernel]) for scale in (1.1, 1.2, 1.3)]
    drift = dict(measures.method_estimates(cells, 1, resamples=20))["relative_kernel_drift"]
    assert drift.by_seed == pytest.approx((0.1, 0.2, 0.3), rel=1e-5)
    half = 0.1 * 4.302653 / 3**0.5  # The standard deviation of the three runs is 0.1.
    assert drift.seeds == pytest.approx((0.2 * np.exp(-half / 0.2), 0.2 * np.exp(half / 0.2)), rel=1e-4)
    assert drift.examples == pytest.approx((0.2, 0.2), rel=1e-5)  # The same in all resamples of examples.
    assert drift.ends == drift.seeds
    single = dict(measures.method_estimates(cells[:1], 1, resamples=20))["relative_kernel_drift"]
    assert single.ends == single.examples


def test_a_score_that_is_undefined_stays_so(kernel):
    cell = planted([kernel, kernel])
    cell["points"][0]["score"] = None  # A cell stores this for a correlation with constant predictions.
    assert np.isnan(dict(measures.method_estimates([cell], 0, resamples=1))["score"].value)


@pytest.mark.parametrize(
    ("ends", "expected"),
    [((0.01, 0.09), "yes"), ((0.05, 0.2), "open"), ((0.2, 0.4), "no"), ((np.nan, np.nan), "no"), ((None, None), "no")],
)  # fmt: skip
def test_lazy(ends, expected):
    assert is_lazy(Metric("relative_jacobian_drift", 0.15, *ends, "", "trained", "full", "")) == expected


# --- the command ------------------------------------------------------------------------------------------------------


def test_a_run_in_pieces(config, result):
    assert [row["method"] for row in result.tables["methods"]] == list(METHODS)
    assert result.arrays["steps"].tolist() == [0, 2, 4]
    for method in METHODS:
        metric = {name: result.metric(name, stage="trained", left=method).value for name in (
            "relative_kernel_drift", "kernel_alignment_with_start", "kernel_cka_with_start", "relative_jacobian_drift",
            "relative_jacobian_drift_same_head", "linearisation_error", "score")}  # fmt: skip
        assert min(metric["relative_kernel_drift"], metric["relative_jacobian_drift"]) > 0
        starts, ends = ([result.arrays[f"{stage}.{method}.seed{s}"] for s in (0, 1)]
                        for stage in ("initialisation", "trained"))  # fmt: skip
        drifts = [np.linalg.norm(b - a) / np.linalg.norm(a) for a, b in zip(starts, ends)]
        assert metric["relative_kernel_drift"] == pytest.approx(np.mean(drifts), rel=1e-5)
    for stage in ("initialisation", "trained"):
        for name in ("cka", "alignment", "relative_distance_best_scale"):
            for method in METHODS[1:]:
                value = result.metric(name, stage=stage, left="full", right=method).value
                assert 0 <= value <= 1 + 1e-9
    # A second call computes nothing and gives the same result.
    again = kernel_drift.run(replace(config, max_runs=0))
    assert again is not None
    assert [(m.name, m.left, m.right) for m in again.metrics] == [(m.name, m.left, m.right) for m in result.metrics]
    np.testing.assert_equal([m.value for m in again.metrics], [m.value for m in result.metrics])


def test_measuring_changes_nothing(config, result):
    data = config.run.load("demo")
    plain = training_run(config.run, data, Method("full"), seed=1)
    score = [r["by_seed"][1] for r in result.tables["checkpoints"] if (r["method"], r["step"], r["quantity"])
             == ("full", 4, "score")]  # fmt: skip
    assert score == [plain["scores"]["accuracy"]]


def test_the_tables_answer_for_every_method(result):
    text, markdown = summary(result), summary(result, markdown=True)
    assert all(f"{method}, {PERMUTED}" in text for method in METHODS)
    assert "features fixed" in text
    assert markdown.count("| full ") >= 1


def test_the_figure(config, result, tmp_path):
    drawn = figure.draw(result)
    width, height = drawn.get_size_inches()
    box = drawn.get_tightbbox()
    assert width == PAGE_WIDTH
    assert min(box.x0, box.y0) >= 0
    assert box.x1 <= width
    assert box.y1 <= height
    assert all(text.get_fontsize() >= 7 for text in drawn.findobj(mpl.text.Text) if text.get_text())
    paths = save(drawn, tmp_path, "kernel_drift")
    assert [path.read_bytes() for path in paths] == [(config.output_dir / p.name).read_bytes() for p in paths]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_examples": 1}, "n_examples must be at least 2"),
        ({"n_jacobians": 25}, "n_jacobians must be at most the 24 examples"),
        ({"checkpoints": (1.5,)}, "checkpoints are shares of the steps"),
        ({"seeds": ()}, "seeds must be one or more"),
        ({"methods": ("lorra",)}, "unknown method 'lorra'"),
    ],
)
def test_mistakes(changes, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        kernel_drift.run(kernel_drift.Config(**changes))
